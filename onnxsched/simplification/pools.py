"""Averages of fewer channels that compute the same."""

from __future__ import annotations

import onnx

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute, with_attributes
from onnxsched_runtime.model import is_standard, renamed
from onnxsched_runtime.tensor import TensorType

_RANK = 4


def average_after_convolution(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A convolution of single pixels before an AveragePool instead of after it.

    Both are linear, so that their order does not matter. The pool has fewer channels to read and
    write then, which is all it does: in the last branch of an inception module a quarter of them.
    Where it counts its padding, the convolution pads instead, and its bias is what is counted.
    """
    if not is_standard(node, "Conv") or not _mixes_channels(index, node):
        return None
    pool = index.sole_writer(node.input[0], "AveragePool")
    if pool is None or not _keeps_size(pool):
        return None
    shape = index.shape(pool.input[0])
    if shape is None or len(shape) != _RANK:
        return None
    result = node.output[0]
    mixed = index.unused(f"{result}/mixed")
    before = renamed(node, {node.input[0]: pool.input[0]}, {result: mixed})
    after = renamed(pool, {pool.input[0]: mixed}, {pool.output[0]: result})
    height, width = shape[2:]
    if attribute(pool, "count_include_pad", 0):
        pads = list(attribute(pool, "pads", [0] * 4))
        before = with_attributes(before, pads=pads)
        after = with_attributes(after, pads=[0] * 4)
        height, width = height + pads[0] + pads[2], width + pads[1] + pads[3]
    kind = index.tensors[result]
    channels = index.weights[node.input[1]].dims[0]
    types = {mixed: TensorType(kind.element_type, (shape[0], channels, height, width))}
    return Replacement((pool, node), (before, after), tensors=types)


def reads_single_pixels(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a convolution computes each pixel from one pixel of an image of the same size."""
    weight = index.weights.get(node.input[1])
    return (
        weight is not None
        and list(weight.dims[2:]) == [1, 1]
        and set(attribute(node, "strides", [1])) == {1}
        and set(attribute(node, "pads", [0])) == {0}
        and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    )


def _mixes_channels(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether a convolution makes fewer channels, each of the same pixel's."""
    if not reads_single_pixels(index, node) or attribute(node, "group", 1) != 1:
        return False
    outputs, inputs = index.weights[node.input[1]].dims[:2]
    return outputs < inputs and all(name in index.weights for name in node.input[2:] if name)


def _keeps_size(pool: onnx.NodeProto) -> bool:
    """Whether a pool moves by one pixel, by windows whose padding is written down."""
    return (
        set(attribute(pool, "strides", [1])) == {1}
        and set(attribute(pool, "dilations", [1])) == {1}
        and attribute(pool, "ceil_mode", 0) == 0
        and attribute(pool, "auto_pad", b"NOTSET") == b"NOTSET"
    )
