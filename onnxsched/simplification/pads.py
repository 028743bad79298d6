"""Zeros around an image that no kernel has to write.

With channels last, ORT's kernel for Pad takes longer than the convolutions around it.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched.simplification.pools import reads_single_pixels
from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute, with_attributes
from onnxsched_runtime.model import is_standard, renamed
from onnxsched_runtime.tensor import TensorType

_AXES = 2
"""Of an image `[batch, channels, height, width]`, height and width are the last."""
_RANK = 4


def pad_before_average(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """An AveragePool of what a Pad has put zeros around counts them itself.

    Where there are more on one side than on the other, it leaves them out of its count, which
    every implementation does alike, and its windows at the border are scaled.
    """
    found = _padded_image(index, node, "AveragePool")
    if found is None:
        return None
    pad, pads = found
    if pads[:_AXES] == pads[_AXES:]:
        alone = with_attributes(node, pads=list(pads), count_include_pad=1)
        return Replacement((node,), (renamed(alone, {pad.output[0]: pad.input[0]}),))
    alone = with_attributes(node, pads=list(pads), count_include_pad=0)
    share = _inside(index, node, pad, pads).mean(axis=(-2, -1), dtype=np.float32)
    return _finished(index, node, pad, alone, "Mul", share)


def pad_before_maximum(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A MaxPool of what a Pad has put zeros around; at the border it is at least zero."""
    found = _padded_image(index, node, "MaxPool")
    if found is None:
        return None
    pad, pads = found
    alone = with_attributes(node, pads=list(pads))
    if index.writer(pad.input[0], "Relu") is not None:
        return Replacement((node,), (renamed(alone, {pad.output[0]: pad.input[0]}),))
    is_inside = _inside(index, node, pad, pads).all(axis=(-2, -1))
    least = np.where(is_inside, np.float32(-np.inf), np.float32(0))
    return _finished(index, node, pad, alone, "Max", least)


def convolution_of_every_other(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A convolution of single pixels that itself takes one of every few, which a pool did before.

    Where the image is moved before by a Pad at its end and a Slice of its beginning, as
    NASNet's cells do, only the pixels that are taken are moved.
    """
    if not is_standard(node, "Conv") or not reads_single_pixels(index, node):
        return None
    pool = index.sole_writer(node.input[0], "AveragePool", "MaxPool")
    if pool is None or len(pool.output) != 1 or not _takes_single_pixels(pool):
        return None
    strides = list(attribute(pool, "strides", [1, 1]))
    moved = index.sole_writer(pool.input[0], "Slice")
    if moved is None:
        taken = renamed(with_attributes(node, strides=strides), {node.input[0]: pool.input[0]})
        return Replacement((pool, node), (taken,))
    return _moved(index, node, pool, moved, strides)


def _moved(
    index: GraphIndex,
    node: onnx.NodeProto,
    pool: onnx.NodeProto,
    moved: onnx.NodeProto,
    strides: list[int],
) -> Replacement | None:
    """A Slice of the pixels that are taken; the convolution adds those that are zeros."""
    begins = _begins(index, moved)
    wanted = index.shape(pool.output[0])
    old = [moved, pool, node]
    source = moved.input[0]
    pad = index.sole_writer(source, "Pad")
    if pad is not None and (zeros := _zeros(index, pad)) is not None:
        if any(zeros[:_AXES]):
            return None
        old, source = [pad, *old], pad.input[0]
    kind = index.tensors.get(source)
    if begins is None or wanted is None or kind is None or kind.shape is None:
        return None
    sizes = [
        len(range(begin, size, stride))
        for begin, size, stride in zip(begins, kind.shape[_AXES:], strides, strict=True)
    ]
    missing = [there - size for there, size in zip(wanted[_AXES:], sizes, strict=True)]
    if max(missing) > 1 or not all(sizes):
        return None
    stem = index.unused(f"{node.output[0]}/taken")
    values = {
        f"{stem}/starts": [*begins],
        f"{stem}/ends": [*kind.shape[_AXES:]],
        f"{stem}/axes": [2, 3],
        f"{stem}/steps": strides,
    }
    taken = helper.make_node("Slice", [source, *values], [stem], moved.name)
    convolved = renamed(with_attributes(node, pads=[0, 0, *missing]), {node.input[0]: stem})
    weights = tuple(
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()
    )
    types = {stem: TensorType(kind.element_type, (*kind.shape[:_AXES], *sizes))}
    return Replacement(tuple(old), (taken, convolved), weights, types)


def _padded_image(
    index: GraphIndex, node: onnx.NodeProto, op_type: str
) -> tuple[onnx.NodeProto, tuple[int, ...]] | None:
    """The Pad before a pool, and the zeros it puts on each side, if only such pools see it."""
    if not is_standard(node, op_type):
        return None
    pad = index.writer(node.input[0], "Pad")
    if pad is None or pad.output[0] in index.outputs:
        return None
    pads, image = _zeros(index, pad), index.shape(pad.output[0])
    kernel: list[int] = attribute(node, "kernel_shape", [])
    if image is None or any(n < k for n, k in zip(image[_AXES:], kernel, strict=False)):
        return None  # there may be one window all the same, as strides are rounded
    if pads is None or not all(_can_pad(one, pads) for one in index.readers[pad.output[0]]):
        return None
    known = index.tensors.get(pad.input[0]), index.tensors.get(node.output[0])
    if any(kind is None or kind.element_type != TensorProto.FLOAT for kind in known):
        return None
    return pad, pads


def _can_pad(pool: onnx.NodeProto, pads: tuple[int, ...]) -> bool:
    """Whether a node is a pool that can take over zeros around its image."""
    kernel: list[int] = attribute(pool, "kernel_shape", [])
    return (
        is_standard(pool, "AveragePool", "MaxPool")
        and len(pool.output) == 1
        and len(kernel) == _AXES
        and all(pad < size for pad, size in zip(pads, [*kernel, *kernel], strict=True))
        and set(attribute(pool, "pads", [0])) == {0}
        and set(attribute(pool, "dilations", [1])) == {1}
        and attribute(pool, "ceil_mode", 0) == 0
        and attribute(pool, "auto_pad", b"NOTSET") == b"NOTSET"
    )


def _zeros(index: GraphIndex, pad: onnx.NodeProto) -> tuple[int, ...] | None:
    """The zeros that a Pad puts above, left, below and right; None if it does anything else."""
    shape = index.shape(pad.input[0])
    if len(pad.input) < 2 or shape is None or len(shape) != _RANK:
        return None
    amounts = index.constant(pad.input[1])
    has_value = len(pad.input) > 2 and pad.input[2]
    if (
        attribute(pad, "mode", b"constant") != b"constant"
        or amounts is None
        or (has_value and not index.is_scalar(pad.input[2], 0))
        or any(pad.input[3:])
    ):
        return None
    begins, ends = amounts[:_RANK].tolist(), amounts[_RANK:].tolist()
    if any([*begins[:_AXES], *ends[:_AXES]]) or min(*begins, *ends) < 0:
        return None
    return (*begins[_AXES:], *ends[_AXES:])


def _inside(
    index: GraphIndex, node: onnx.NodeProto, pad: onnx.NodeProto, pads: tuple[int, ...]
) -> np.ndarray:
    """Which pixels of each window are the image's: `[1, 1, height, width, *kernel]`."""
    shape = index.shape(pad.input[0])
    assert shape is not None
    image = np.pad(np.ones(shape[_AXES:], bool), (pads[::2], pads[1::2]))
    windows = np.lib.stride_tricks.sliding_window_view(image, attribute(node, "kernel_shape", []))
    down, right = attribute(node, "strides", [1, 1])
    return windows[None, None, ::down, ::right]


def _finished(
    index: GraphIndex,
    node: onnx.NodeProto,
    pad: onnx.NodeProto,
    pool: onnx.NodeProto,
    op_type: str,
    border: np.ndarray,
) -> Replacement:
    """A pool of the image alone, and what makes its border what it was."""
    result = node.output[0]
    pooled = index.unused(f"{result}/alone")
    weight = numpy_helper.from_array(border, index.unused(f"{result}/border"))
    alone = renamed(pool, {pad.output[0]: pad.input[0]}, {result: pooled})
    alone.name = index.unused(f"{node.name}/alone")
    finish = helper.make_node(op_type, [pooled, weight.name], [result], node.name)
    return Replacement((node,), (alone, finish), (weight,), {pooled: index.tensors[result]})


def _takes_single_pixels(pool: onnx.NodeProto) -> bool:
    """Whether a pool only leaves pixels out: its windows are one pixel each."""
    return (
        list(attribute(pool, "kernel_shape", [])) == [1, 1]
        and set(attribute(pool, "pads", [0])) == {0}
        and attribute(pool, "ceil_mode", 0) == 0
        and attribute(pool, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    )


def _begins(index: GraphIndex, node: onnx.NodeProto) -> tuple[int, ...] | None:
    """Where a Slice begins in height and width, if it leaves nothing else out."""
    shape = index.shape(node.input[0])
    constants = [index.constant(name) for name in node.input[1:] if name]
    if shape is None or len(shape) != _RANK or len(constants) < 3 or not all(node.input[:4]):
        return None
    if any(value is None for value in constants):
        return None
    starts, ends, axes, *steps = (value.tolist() for value in constants if value is not None)
    begins = [0] * _RANK
    for start, end, axis in zip(starts, ends, axes, strict=True):
        if start < 0 or end < shape[axis] or axis % _RANK < _AXES:
            return None
        begins[axis % _RANK] = start
    if steps and set(steps[0]) != {1}:
        return None
    return tuple(begins[_AXES:])
