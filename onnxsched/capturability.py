"""Which operators can't be captured into a CUDA graph, and why; and what is drawn at random."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from onnxsched.graph import RANDOM_TYPES
from onnxsched_runtime.model import is_standard, node_reads, subgraphs
from onnxsched_runtime.tensor import TensorType

_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


def host_reasons(
    model: onnx.ModelProto, tensors: Mapping[str, TensorType], on_cpu: Mapping[str, str]
) -> dict[str, str]:
    """For each node that can't be captured the reason.

    Args:
        model: The model, its nodes uniquely named.
        tensors: Types from `tensor_types`.
        on_cpu: The nodes that only ORT's CPU provider has, by name.
    """
    weights = {weight.name for weight in model.graph.initializer}
    reasons = {}
    for node in model.graph.node:
        flowing = [*(n for n in node_reads(node) if n not in weights), *filter(None, node.output)]
        if reason := _host_reason(node, flowing, tensors, on_cpu):
            reasons[node.name] = reason
    return reasons


def _host_reason(
    node: onnx.NodeProto,
    flowing: list[str],
    tensors: Mapping[str, TensorType],
    on_cpu: Mapping[str, str],
) -> str | None:
    """Why a node can't be captured; None where it can."""
    if is_standard(node, *_CONTROL_FLOW):
        return f"{node.op_type} decides at run time what to execute"
    if _is_random(node):
        return f"{node.op_type} draws numbers that a replay would repeat"
    for name in flowing:
        kind = tensors.get(name)
        if kind is None:
            return f"'{name}' is a sequence or optional"
        if kind.element_type == TensorProto.STRING:
            return f"'{name}' holds strings"
        if kind.shape is None:
            return f"the shape of '{name}' depends on the data"
        if not kind.is_static:
            return f"'{name}' is of a type without device buffers"
    if node.name in on_cpu:
        return f"ONNX Runtime runs {node.op_type} on the CPU"
    return None


def random_tensors(model: onnx.ModelProto) -> set[str]:
    """The tensors that differ from session to session: drawn at random, or computed from such."""
    found: set[str] = set()
    for node in model.graph.node:
        if _draws(node) or found.intersection(node_reads(node)):
            found.update(filter(None, node.output))
    return found


def _is_random(node: onnx.NodeProto) -> bool:
    """Whether an operator draws numbers; a Dropout does if it may be in training mode."""
    trains = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
    return trains or node.op_type in RANDOM_TYPES


def _draws(node: onnx.NodeProto) -> bool:
    inside = (inner for body in subgraphs(node) for inner in body.node)
    return _is_random(node) or any(map(_draws, inside))
