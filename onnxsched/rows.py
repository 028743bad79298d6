"""Which rows of an image an operator reads to write some of its result's."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx

from onnxsched.graph_view import CONVOLUTIONS, POOLS, GraphView, kind_of
from onnxsched.pad_fusion import is_behind_pad
from onnxsched.siblings import Window, window_of
from onnxsched_runtime.model import attributes_of

HEIGHT_AXIS = 2
"""Of images, which are `[batch, channels, height, width]`."""
_RANK = 4
_ROW_BY_ROW = {
    ("", name)
    for name in (
        "Add", "Sub", "Mul", "Div", "Max", "Min", "Relu", "LeakyRelu", "PRelu", "Elu", "Clip",
        "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Neg", "Abs", "Exp", "Sqrt", "LRN",
        "BatchNormalization", "Concat",
    )
}  # fmt: skip
"""Operators that write each row of their result from the same rows of what they read."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring rows of an image."""

    start: int
    stop: int
    """The first row that is no longer among them."""

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def shifted(self, by: int) -> Rows:
        """As many rows, `by` further down."""
        return Rows(self.start + by, self.stop + by)


def hull(parts: Sequence[Rows]) -> Rows:
    """The fewest neighbouring rows that all parts are among."""
    return Rows(min(part.start for part in parts), max(part.stop for part in parts))


def common(parts: Sequence[Rows]) -> Rows:
    """The rows that are in every part; there has to be one."""
    return Rows(max(part.start for part in parts), min(part.stop for part in parts))


def owned_rows(height: int, count: int, band: int) -> Rows:
    """The rows that a band of `count` answers for: as even as they can be."""
    return Rows(height * band // count, height * (band + 1) // count)


@dataclass(frozen=True, slots=True)
class RowWindow:
    """What an operator reads for one row: that row itself where nothing else is said."""

    span: int = 1
    """Rows from the first to the last that it reads."""
    stride: int = 1
    above: int = 0
    """Rows of padding; fewer than 0 where the image is cropped."""
    below: int = 0

    def reads(self, rows: Rows, height: int) -> Rows:
        """The rows of an image of `height` that are read for rows of the result; at least one."""
        start = rows.start * self.stride - self.above
        stop = (rows.stop - 1) * self.stride - self.above + self.span
        start = min(max(0, start), height - 1)
        return Rows(start, max(min(height, stop), start + 1))

    def writes(self, rows: Rows, height: int) -> Rows:
        """The rows of the result that can be written from rows of an image of `height`."""
        first = max(0, -(-(rows.start + self.above) // self.stride)) if rows.start else 0
        is_last = rows.stop == height
        end = height + self.below if is_last else min(rows.stop, height + min(0, self.below))
        return Rows(first, (end + self.above - self.span) // self.stride + 1)

    def entered(self, rows: Rows, height: int) -> Rows:
        """Those of the rows that the operator must be given to write what it can from them.

        Within an image it starts with the first row that a whole window starts with. What is
        cropped is left out, so that nothing is left to crop.
        """
        first = self.writes(rows, height).start * self.stride - self.above
        return Rows(max(rows.start, first), min(rows.stop, height + min(0, self.below)))

    def pads(self, rows: Rows, height: int) -> tuple[int, int]:
        """The padding above and below those rows: only the edges of the image have any."""
        above = 0 if rows.start else self.above
        return (max(0, above), max(0, self.below) if rows.stop == height else 0)


def image_inputs(view: GraphView, node: onnx.NodeProto) -> list[str]:
    """What flows into a node, each tensor once."""
    return list(dict.fromkeys(name for name in node.input if name and name not in view.weights))


def height_of(view: GraphView, tensor: str) -> int:
    """The rows of an image."""
    return (view.model.tensors[tensor].shape or ())[HEIGHT_AXIS]


def row_window(view: GraphView, node: onnx.NodeProto) -> RowWindow | None:
    """What a node reads for a row of its only result; None where it can't be cut into bands.

    It can be where it is a convolution or a pool over images with stored weights, pads an image
    with one value, crops it, or treats every row alike: elementwise with what is as large or
    stored without rows, or over channels.
    """
    flowing = image_inputs(view, node)
    written = [name for name in node.output if name]
    if (
        not flowing
        or len(written) != 1
        or not all(_is_image(view, t) for t in (*flowing, *written))
    ):
        return None
    kind = kind_of(node)
    if kind in _ROW_BY_ROW:
        return RowWindow() if _is_row_by_row(view, node, flowing) else None
    if kind == ("", "Pad"):
        return _padding(view, node)
    if kind == ("", "Slice"):
        return _cropping(view, node)
    if kind not in CONVOLUTIONS | POOLS or len(flowing) != 1 or len(node.input) > 3:
        return None
    return _sliding(view, node)


def explicit_window(view: GraphView, node: onnx.NodeProto) -> Window:
    """The window of a convolution or pool, with the padding that its other attributes stand for.

    `SAME` is the least padding with which the result is as large as it is, `VALID` none;
    `ceil_mode` of a maximum, which sees no padding, is as much more of it below.
    """
    given = attributes_of(node)
    is_pool = kind_of(node) in POOLS
    kernel = given["kernel_shape"] if is_pool else view.weights[node.input[1]].dims[2:]
    window = window_of(node, kernel)
    sizes, results = (
        (view.model.tensors[t].shape or ())[HEIGHT_AXIS:] for t in (node.input[0], node.output[0])
    )
    rows = zip(results, window.strides, window.kernel, window.dilations, sizes, strict=True)
    sums = [max(0, (n - 1) * s + (k - 1) * d + 1 - size) for n, s, k, d, size in rows]
    auto_pad = given.get("auto_pad", b"NOTSET")
    if auto_pad == b"VALID":
        return replace(window, begins=(0,) * len(sums), ends=tuple(sums))
    if auto_pad == b"NOTSET":
        pads = zip(window.ends, window.begins, sums, strict=True)
        return replace(window, ends=tuple(max(end, both - begin) for end, begin, both in pads))
    less, more = tuple(n // 2 for n in sums), tuple(n - n // 2 for n in sums)
    begins, ends = (more, less) if auto_pad == b"SAME_LOWER" else (less, more)
    return replace(window, begins=begins, ends=ends)


def _sliding(view: GraphView, node: onnx.NodeProto) -> RowWindow | None:
    """The rows of a convolution or pool; None where windows may be beyond the image's edge."""
    is_rounded_up = bool(attributes_of(node).get("ceil_mode"))
    if is_rounded_up and node.op_type != "MaxPool":  # a mean counts rows of padding, or does not
        return None
    if any(name not in view.weights for name in node.input[1:] if name):
        return None
    window = explicit_window(view, node)
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    if kind_of(node) in POOLS:
        is_sound = _is_pool_sound(view, node, window)
    else:  # one of single pixels may pad for a pool behind it
        is_sound = 0 <= window.begins[0] <= spans[0] and 0 <= window.ends[0] <= spans[0]
    if node.op_type == "AveragePool" and attributes_of(node).get("count_include_pad"):
        is_sound &= attributes_of(node).get("pads", [0] * 4)[2:] == [*window.ends]
    if not is_sound:
        return None
    return RowWindow(spans[0], window.strides[0], window.begins[0], window.ends[0])


def _is_pool_sound(view: GraphView, node: onnx.NodeProto, window: Window) -> bool:
    """Whether ORT pads an image as the window of its pool says, and takes that as attributes."""
    is_same = attributes_of(node).get("auto_pad", b"").startswith(b"SAME")
    if is_same and (
        max(window.dilations) > 1 or any(map(operator.gt, window.strides, window.kernel))
    ):
        return False  # it counts no gaps, and crops the image
    if is_behind_pad(node, view.writer):
        return False
    edges = zip(window.begins, window.ends, window.kernel, strict=True)
    return all(0 <= begin < size and 0 <= end < size for begin, end, size in edges)


def _padding(view: GraphView, node: onnx.NodeProto) -> RowWindow | None:
    """The rows that a Pad adds; None where they are not all of one value, or not stored."""
    mode = attributes_of(node).get("mode", b"constant")
    if mode != b"constant" or len(node.input) not in (2, 3) or node.input[1] not in view.weights:
        return None
    pads = view.array(node.input[1])
    rank = len(pads) // 2
    return RowWindow(above=int(pads[HEIGHT_AXIS]), below=int(pads[rank + HEIGHT_AXIS]))


def crop_axes(view: GraphView, node: onnx.NodeProto) -> list[int]:
    """The axes of an image that a Slice cuts, in the order of its bounds."""
    count = len(view.array(node.input[1]))
    axes = view.array(node.input[3]).tolist() if len(node.input) > 3 else range(count)
    return [axis % _RANK for axis in axes]


def _cropping(view: GraphView, node: onnx.NodeProto) -> RowWindow | None:
    """The rows that a Slice leaves out; None where it takes steps, or bounds are not stored."""
    if len(node.input) < 3 or any(name not in view.weights for name in node.input[1:]):
        return None
    starts, ends = (view.array(name).tolist() for name in node.input[1:3])
    if len(node.input) > 4 and any(step != 1 for step in view.array(node.input[4])):
        return None
    height, axes = height_of(view, node.input[0]), crop_axes(view, node)
    if HEIGHT_AXIS not in axes:
        return RowWindow()
    place = axes.index(HEIGHT_AXIS)
    start, stop, _ = slice(starts[place], ends[place]).indices(height)
    return RowWindow(above=-start, below=stop - height)


def _is_image(view: GraphView, tensor: str) -> bool:
    kind = view.model.tensors.get(tensor)
    return (
        kind is not None and kind.is_static and len(kind.shape or ()) == _RANK and kind.nbytes > 0
    )


def _is_row_by_row(view: GraphView, node: onnx.NodeProto, flowing: Sequence[str]) -> bool:
    """Whether a node of a kind that may be so treats rows alike, and nothing else has rows."""
    types, stored = view.model.tensors, [name for name in node.input if name in view.weights]
    given = attributes_of(node)
    if node.op_type == "Concat":
        return not stored and given["axis"] in (1, -3)
    if node.op_type == "BatchNormalization" and (given.get("training_mode") or len(flowing) > 1):
        return False
    shapes = [view.weights[name].dims for name in stored]
    is_even = all(len(dims) < 2 or dims[-2] == 1 for dims in shapes)
    return is_even and all(types[t].shape == types[node.output[0]].shape for t in flowing)
