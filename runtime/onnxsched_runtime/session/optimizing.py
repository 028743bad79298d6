"""Let ONNX Runtime optimize a model, or make it half precision."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from onnxsched_runtime.session.binding import CPU_PROVIDER, float16_converter, onnxruntime
from onnxsched_runtime.session.creating import add_weights, created, session_options
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart

_UNPORTABLE_FUSIONS = ["BiasSoftmaxFusion", "ConvAddActivationFusion"]
"""Fusions whose result only the CUDA provider runs: made in a session, never in a file."""

_BIAS_FUSION = "MatMulAddFusion"
"""Makes a Gemm of MatMul and bias. Left alone, later fusions take the bias in for nothing."""
_COPY_REMOVAL = "CommonSubexpressionElimination"
"""Would make one of operators that are computed on several devices."""
_PAD_FUSION = "Pad_Fusion"
"""Makes padding of a pool of the zeros around its image, and those count no longer."""


def lower_to_file(source: ModelPart, target: Path, settings: SessionSettings) -> None:
    """Let ORT make every optimization for a GPU and a variant, and save the result.

    But for the one that makes a Gemm of a MatMul and an Add: it has as many kernels, and the
    Reshapes that it adds are copies where a stream ends. And operators that compute the same stay
    apart: those that nobody wanted twice are gone since `optimize_file`. So are the Pads that
    plain ORT takes into a pool; the zeros of others count.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    options = session_options(settings)
    _save_optimized(options, target)
    add_weights(options, source)
    with created(source, options, settings, [_BIAS_FUSION, _COPY_REMOVAL, _PAD_FUSION]):
        pass


def optimize_file(source: Path, target: Path, settings: SessionSettings) -> dict[str, str]:
    """Let ORT fold constants and fuse operators, and save the result.

    The level is ORT's extended one: the next would bind the file to this machine's processor.

    Returns:
        The nodes that need the CPU provider, with their operator types.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    options = session_options(settings)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    _save_optimized(options, target)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with created(source, options, settings, [*_UNPORTABLE_FUSIONS, _BIAS_FUSION]) as held:
        return {
            node.name: node.op_type
            for part in held[0].get_provider_graph_assignment_info()
            if part.ep_name == CPU_PROVIDER and settings.device.kind != "cpu"
            for node in part.get_nodes()
        }


def to_float16(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """The model with float32 made float16 inside; inputs and outputs keep their types.

    By ONNX Runtime's own converter, which leaves operators alone that have no float16 kernel.

    Args:
        model: Left as it is.
        kept: Further types of operators to leave in float32.
    """
    converter = float16_converter()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():  # of weights below the smallest float16, which become that
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = converter.convert_float_to_float16(
            copy,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*converter.DEFAULT_OP_BLOCK_LIST, *kept],
        )
    _drop_repeated(converted.graph)
    return converted


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Remove what the converter writes twice, in place: Casts of what one operator reads twice."""
    written: set[str] = set()
    kept = []
    for node in graph.node:
        if not written.issuperset(node.output):
            kept.append(node)
        written.update(node.output)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _save_optimized(options: Any, target: Path) -> None:
    options.optimized_model_filepath = str(target)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
