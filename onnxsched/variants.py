"""Which variants of a model there are, and what the sessions of one execute."""

from __future__ import annotations

from dataclasses import replace

from onnxsched.loading import Model
from onnxsched_runtime import cuda
from onnxsched_runtime.calling import called
from onnxsched_runtime.device import Device
from onnxsched_runtime.fused import fused_nodes
from onnxsched_runtime.kernels import Computed, Kernel
from onnxsched_runtime.lowering import lower
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


def possible_variants(model: Model, device: Device) -> tuple[Variant, ...]:
    """What can make a difference: only convolutions have a choice.

    What is quickly prepared comes first. Of hundreds of convolutions a search among all kernels
    may take up the whole budget.
    """
    convolves = any("Conv" in node.op_type for node in model.proto.graph.node)
    if device.kind == "cpu" or model.host_reasons or not convolves:
        return (DEFAULT_VARIANT,)
    return (
        DEFAULT_VARIANT,
        Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic", fuses=True),
        Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic"),
        Variant(conv_search="heuristic"),
        Variant("nhwc", fuse_conv_bias=True),
        Variant("nhwc"),
    )


def lowered_model(
    model: Model, variant: Variant, device: Device, custom_ops: tuple[str, ...]
) -> Model:
    """The model as the sessions of a variant execute it.

    What must stay on the host can't be lowered for a GPU: such a model stays as it is.

    Raises:
        ModelError: ORT refuses to lower it.
    """
    if model.host_reasons:
        return replace(model, variant=variant)
    source = lower(ModelSource(model.proto, model.tensors, variant), device, custom_ops)
    return replace(
        model,
        proto=source.model,
        tensors=source.tensors,
        variant=variant,
        is_lowered=True,
        kernels=_fastest_kernels(source, device),
    )


def _fastest_kernels(source: ModelSource, device: Device) -> dict[Computed, Kernel]:
    """The fastest kernel of each fused convolution and pool, measured."""
    found = {
        node.what: called(device, cuda.fastest_kernel, node.what, device)
        for node in fused_nodes(source).values()
    }
    return {what: kernel for what, kernel in found.items() if kernel is not None}
