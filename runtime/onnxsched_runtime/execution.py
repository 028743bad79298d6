"""From an annotated model to what executes it: lowered, planned, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.calling import called
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.executors.ranks import RankExecutor
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.executors.threads import ThreadExecutor
from onnxsched_runtime.fused import fused_nodes
from onnxsched_runtime.lowering import lower, to_lowered
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType

_PRODUCTS = ("MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN", "Einsum")
"""Parts of the names of operators that call cuBLAS."""

Executor = StreamExecutor | ThreadExecutor | RankExecutor
"""What runs a plan."""


def multiplies_matrices(model: onnx.ModelProto, tensors: Mapping[str, TensorType]) -> bool:
    """Whether cuBLAS's workspace matters to a model's speed.

    Not to a convolutional one with a last layer, nor where matrices are multiplied by vectors, as
    for a single token: those kernels use none.
    """
    products = [n for n in model.graph.node if any(word in n.op_type for word in _PRODUCTS)]
    products = [node for node in products if not _has_one_row(tensors.get(node.output[0]))]
    convolutions = [node for node in model.graph.node if "Conv" in node.op_type]
    return len(products) > len(convolutions) / 10


def _has_one_row(kind: TensorType | None) -> bool:
    return kind is not None and kind.shape is not None and 1 in kind.shape[-2:]


def lowered_source(
    model: onnx.ModelProto,
    annotation: Annotation,
    custom_ops: tuple[str, ...] = (),
    device: Device | None = None,
) -> ModelSource:
    """The model as its annotation wants it executed.

    On the CPU there is one way, and what must stay on the host can't be lowered for a GPU. The
    first model that a process executes on a GPU says how much memory cuBLAS keeps. It is lowered
    on the schedule's first device if no other is given. Where one has no kernel for a fused
    convolution, or no cuDNN, sessions run all of them, the bias by itself: what ORT makes of it in
    the same kernel has not been checked then.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    devices = annotation.devices if device is None else (device,)
    device = devices[0]
    source = ModelSource(model, annotation.tensors, annotation.variant, kernels=annotation.kernels)
    if device.kind == "cpu":
        return source
    cuda.keep_blas_workspace("full" if multiplies_matrices(model, annotation.tensors) else "small")
    if annotation.host_reasons:
        return source
    lowered = lower(source, device, custom_ops)
    if all(_are_launchable(lowered, one) for one in devices):
        return lowered
    variant = replace(annotation.variant, fuses=False, fuse_conv_bias=False)
    return lower(replace(source, variant=variant), device, custom_ops)


def _are_launchable(source: ModelSource, device: Device) -> bool:
    """Whether cuDNN has a kernel for each fused node; they are kept for those who run."""
    try:
        for node in fused_nodes(source).values():
            wanted = source.kernels.get(node.what)
            called(device, cuda.fused_kernel, node.what, device, wanted)
    except OnnxschedError:
        return False
    return True


def plan_lowered(
    model: onnx.ModelProto, annotation: Annotation, source: ModelSource
) -> ExecutionPlan:
    """Plan a lowered model by the schedule of the portable one.

    Raises:
        AnnotationError: The launch order runs a node before one that it reads from.
    """
    placements = annotation.placements
    if source.model is not model:
        placements = to_lowered(placements, model, source.model)
    return plan_model(source.model, placements, annotation.host_reasons)


def open_executor(
    source: ModelSource,
    plan: ExecutionPlan,
    *,
    capture: Capture = "whole",
    custom_ops: tuple[str, ...] = (),
) -> Executor:
    """Make a plan ready to run on the device of its segments.

    Args:
        source: The model that segments are cut out of.
        plan: Segments and their order.
        capture: How a GPU's plan is captured; see `load`.
        custom_ops: Shared libraries with custom operators.
    """
    if plan.segments[0].placement.device.kind == "cpu":
        return ThreadExecutor(source, plan, custom_ops)
    return StreamExecutor(source, plan, capture, custom_ops)
