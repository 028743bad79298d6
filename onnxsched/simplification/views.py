"""Operators that only change the shape: ONNX Runtime lets them alias what they read, for free."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from onnxsched.simplification.replacing import (
    GraphIndex,
    Replacement,
    attribute,
    is_standard,
    with_inputs,
)

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Those operators; Transpose is none, since ONNX Runtime copies for it."""


def transpose_as_view(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A Transpose that moves only dimensions of size 1 is a Reshape, which copies nothing."""
    if not is_standard(node, "Transpose"):
        return None
    shape = index.shape(node.input[0])
    if shape is None:
        return None
    moved = [axis for axis in permutation(node, len(shape)) if shape[axis] != 1]
    return _viewed(index, node, node.input[0]) if moved == sorted(moved) else None


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
    if not all(result in reader.input for reader in readers):
        return None
    return Replacement((node, *readers), tuple(with_inputs(n, {result: source}) for n in readers))


def permutation(transpose: onnx.NodeProto, rank: int) -> list[int]:
    """Which axis of what it reads each axis of a Transpose's result is."""
    return attribute(transpose, "perm", list(reversed(range(rank))))


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
