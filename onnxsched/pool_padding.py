"""Pools whose results onnx takes to be of another shape than ONNX Runtime makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from onnxsched_runtime.model import attributes_of, is_standard, node_reads
from onnxsched_runtime.tensor import TensorType

_POOLS = ("MaxPool", "AveragePool")
_SAME = (b"SAME_UPPER", b"SAME_LOWER")
_SPATIAL = 2
"""The first axis of an image that windows move along."""


@dataclass(frozen=True)
class _Axis:
    """A pool along one axis."""

    size: int
    span: int
    """Of a window, gaps included."""
    stride: int
    begin: int
    end: int
    """Padding before and behind."""

    @property
    def fitting(self) -> int:
        """How many windows fit in."""
        return (self.size + self.begin + self.end - self.span) // self.stride + 1

    @property
    def rounded(self) -> int:
        """How many begin before all is seen."""
        return -(-(self.size + self.begin + self.end - self.span) // self.stride) + 1

    @property
    def started(self) -> int:
        """Those of them that do not begin behind the image."""
        is_behind = (self.rounded - 1) * self.stride >= self.size + self.begin
        return self.rounded - is_behind

    def end_for(self, count: int) -> int:
        """The padding behind with which so many windows fit in, and no more."""
        return max(self.end, (count - 1) * self.stride + self.span - self.size - self.begin)


def has_doubtful_pool(model: onnx.ModelProto) -> bool:
    """Whether there is a pool that `agree_on_pool` may change: no shapes are needed to tell."""
    return any(_is_doubtful(node) for node in model.graph.node)


def _is_doubtful(node: onnx.NodeProto) -> bool:
    if not is_standard(node, *_POOLS):
        return False
    given = attributes_of(node)
    is_same = given.get("auto_pad") in _SAME
    return bool(given.get("ceil_mode")) or (is_same and max(given.get("dilations") or [1]) > 1)


def agree_on_pool(model: onnx.ModelProto, tensors: Mapping[str, TensorType]) -> bool:
    """Write the first pool that onnx and ORT disagree on so that they agree, in place.

    With `ceil_mode` onnx counts a window that begins behind the image, and where windows have gaps
    ORT takes `auto_pad` to pad as if they had none. Of padding that is written out both think the
    same. Results are equal within rounding.

    Args:
        model: The model.
        tensors: The types of its tensors: those behind a pool that is changed are others then.

    Returns:
        Whether there was one.
    """
    for node in model.graph.node:
        if not _is_doubtful(node):
            continue
        shape = tensors[node.input[0]].shape if node.input[0] in tensors else None
        if shape is None or len(shape) <= _SPATIAL or 0 in shape:
            continue
        if changed := _agreed(node, shape[_SPATIAL:]):
            kept = [a for a in node.attribute if a.name not in changed]
            del node.attribute[:]
            node.attribute.extend(kept)
            written = {name: value for name, value in changed.items() if value is not None}
            node.attribute.extend(helper.make_attribute(n, v) for n, v in written.items())
            _forget(model, node)
            return True
    return False


def _agreed(node: onnx.NodeProto, sizes: Sequence[int]) -> dict[str, list[int] | None]:
    """Attributes that change, None for those that go; none where there is nothing to change."""
    given = attributes_of(node)
    rank = len(sizes)
    kernel, ones = list(given["kernel_shape"]), [1] * rank
    strides, dilations = given.get("strides") or ones, given.get("dilations") or ones
    auto_pad = given.get("auto_pad", b"NOTSET")
    is_rounded_up = bool(given.get("ceil_mode"))
    is_same = auto_pad in _SAME
    none = [0] * (2 * rank)
    pads = list(given.get("pads") or none) if auto_pad == b"NOTSET" else none
    lengths = {len(kernel), len(strides), len(dilations), len(pads) / 2}
    if lengths != {rank} or min(*kernel, *strides, *dilations) < 1:
        return {}  # ORT says what is wrong
    if is_same:
        pads = _same_pads(sizes, kernel, strides, auto_pad)
        if min(pads) < 0:
            return {}  # an image can't be told to be cropped
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    edges = zip(sizes, spans, strides, pads[:rank], pads[rank:], strict=True)
    axes = [_Axis(*edge) for edge in edges]
    counts = [axis.started if is_rounded_up else axis.fitting for axis in axes]
    if not is_same and counts == [axis.rounded for axis in axes]:
        return {}
    counts_padding = node.op_type == "AveragePool" and given.get("count_include_pad")
    if counts_padding and counts != [axis.fitting for axis in axes]:
        return {}  # what padding counts then is not what does when it is written out
    ends = [axis.end_for(count) for axis, count in zip(axes, counts, strict=True)]
    pads = [*pads[:rank], *ends]
    if any(not 0 <= pad < k for pad, k in zip(pads, [*kernel, *kernel], strict=True)):
        return {}  # ORT refuses to be told so
    return {"auto_pad": None, "ceil_mode": None, "pads": pads}


def _same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], auto_pad: bytes
) -> list[int]:
    """What ORT pads, which counts no gaps, and crops where strides are longer than windows."""
    begins, ends = [], []
    for size, k, stride in zip(sizes, kernel, strides, strict=True):
        both = (-(-size // stride) - 1) * stride + k - size
        less = both // 2
        begins.append(both - less if auto_pad == b"SAME_LOWER" else less)
        ends.append(both - begins[-1])
    return [*begins, *ends]


def _forget(model: onnx.ModelProto, pool: onnx.NodeProto) -> None:
    """Drop the shapes that are declared of what follows from a pool, in place."""
    graph = model.graph
    stale = set(pool.output)
    for node in graph.node:
        if not stale.isdisjoint(node_reads(node)):
            stale.update(node.output)
    kept = [value for value in graph.value_info if value.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for value in graph.output:
        if value.name in stale and value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
