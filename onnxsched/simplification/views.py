"""Transposes and views that are better views, or not there at all."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from onnxsched.simplification.replacing import GraphIndex, Replacement
from onnxsched_runtime.model import captured_reads, is_standard, renamed
from onnxsched_runtime.views import VIEWS, is_idle


def transpose_as_view(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A Transpose that moves only dimensions of size 1 is a Reshape, which copies nothing."""
    if not is_standard(node, "Transpose"):
        return None
    shape = index.shape(node.input[0])
    if shape is None or not is_idle(node, shape):
        return None
    return _viewed(index, node, node.input[0])


def view_of_view(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A view of a view is one Reshape."""
    if not is_standard(node, *VIEWS):
        return None
    before = index.writer(node.input[0], *VIEWS)
    return None if before is None else _viewed(index, node, before.input[0])


def idle_view(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A view of the same shape goes, unless it writes an output or a subgraph reads it."""
    if not is_standard(node, *VIEWS):
        return None
    source, result = node.input[0], node.output[0]
    readers = index.readers.get(result, ())
    shape = index.shape(source)
    if shape is None or shape != index.shape(result) or result in index.outputs:
        return None
    if any(result in captured_reads(reader) for reader in readers):
        return None
    return Replacement((node, *readers), tuple(renamed(n, {result: source}) for n in readers))


def reshape(
    index: GraphIndex, source: str, result: str, shape: tuple[int, ...], name: str | None = None
) -> tuple[onnx.NodeProto, TensorProto]:
    """A Reshape, and the weight that holds its shape."""
    constant = index.unused(f"{result}/shape")
    weight = helper.make_tensor(constant, TensorProto.INT64, [len(shape)], shape)
    name = name or index.unused(f"{result}/reshape")
    return helper.make_node("Reshape", [source, constant], [result], name), weight


def _viewed(index: GraphIndex, node: onnx.NodeProto, source: str) -> Replacement | None:
    """A Reshape in the place of a node; None where a dimension is unknown or 0."""
    result = node.output[0]
    shape = index.shape(result)
    if shape is None or 0 in shape:
        return None
    view, weight = reshape(index, source, result, shape, node.name)
    return Replacement((node,), (view,), (weight,))
