"""Pools whose results onnx takes to be of another shape than ONNX Runtime makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from onnxsched.pad_fusion import is_behind_pad
from onnxsched_runtime.model import attributes_of, is_standard, node_reads
from onnxsched_runtime.tensor import TensorType

_POOLS = ("MaxPool", "AveragePool")
_SAME = (b"SAME_UPPER", b"SAME_LOWER")
_SPATIAL = 2
"""The first axis of an image that windows move along."""


@dataclass(frozen=True)
class _Axis:
    """A pool along one axis, with the padding that ORT takes its attributes to stand for."""

    size: int
    kernel: int
    span: int
    """Of a window, gaps included."""
    stride: int
    begin: int
    end: int
    """Padding before and behind; fewer than 0 where the image is cropped."""

    @property
    def fitting(self) -> int:
        """How many windows fit in; one where less than a stride is missing, as ORT counts."""
        return int((self.size + self.begin + self.end - self.span) / self.stride) + 1

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


@dataclass(frozen=True)
class _Pool:
    """What ORT makes of the attributes of a pool."""

    axes: tuple[_Axis, ...]
    is_rounded_up: bool
    is_same: bool
    counts_padding: bool

    @property
    def counts(self) -> list[int]:
        """The size of its result along each axis."""
        return [axis.started if self.is_rounded_up else axis.fitting for axis in self.axes]

    @property
    def written_pads(self) -> list[int] | None:
        """Padding that alone says the same; None where none does, or nothing else is said."""
        counts = self.counts
        if min(axis.end for axis in self.axes) < 0:
            return None  # nor can ORT be told to crop an image
        if not self.is_same and counts == [axis.rounded for axis in self.axes]:
            return None
        begins = [axis.begin for axis in self.axes]
        ends = [axis.end_for(count) for axis, count in zip(self.axes, counts, strict=True)]
        if self.counts_padding and ends != [axis.end for axis in self.axes]:
            return None  # more of it would count
        edges = zip(self.axes, begins, ends, strict=True)
        if any(not (0 <= begin < a.kernel and 0 <= end < a.kernel) for a, begin, end in edges):
            return None  # ORT refuses to be told so
        return [*begins, *ends]


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
    """Let onnx and ORT agree on the first pool that they take to have other results, in place.

    With `ceil_mode` onnx counts a window that begins behind the image, and where windows have gaps
    ORT takes `auto_pad` to pad as if they had none. Of padding that is written out both think the
    same, so it is where that is possible: results are equal within rounding. Elsewhere ORT's shape
    is declared, which onnx believes.

    Args:
        model: The model, as ORT has optimized it.
        tensors: The types of its tensors: those behind a pool that is changed are others then.

    Returns:
        Whether there was one.
    """
    writers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        image = tensors.get(node.input[0]) if _is_doubtful(node) else None
        if image is None or image.shape is None or len(image.shape) <= _SPATIAL:
            continue
        pool = None if 0 in image.shape else _pool_of(node, image.shape[_SPATIAL:])
        if pool is None or min(pool.counts) < 1:
            continue
        pads = None if is_behind_pad(node, writers) else pool.written_pads
        if pads is not None:
            _write_pads(node, pads)
            _forget(model, node)
            return True
        shape = (*image.shape[:_SPATIAL], *pool.counts)
        if any(name and _shape(tensors, name) != shape for name in node.output):
            _forget(model, node)
            _declare(model, node, TensorType(image.element_type, shape))
            return True
    return False


def without_doubtful_pools(
    model: onnx.ModelProto, tensors: Mapping[str, TensorType]
) -> onnx.ModelProto:
    """The model with the results of such pools as inputs, for ORT to infer what follows.

    ORT believes no shape that is declared of what it computes itself.

    Args:
        model: Left as it is.
        tensors: The types of its tensors; pools whose results have no shape there stay.
    """
    if not has_doubtful_pool(model):
        return model
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:]
    for node in model.graph.node:
        written = [name for name in node.output if name]
        if not _is_doubtful(node) or any(_shape(tensors, name) is None for name in written):
            found.graph.node.append(node)
            continue
        found.graph.input.extend(
            helper.make_tensor_value_info(name, tensors[name].element_type, tensors[name].shape)
            for name in written
        )
    return found


def _shape(tensors: Mapping[str, TensorType], name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def _pool_of(node: onnx.NodeProto, sizes: Sequence[int]) -> _Pool | None:
    """A pool of an image of such sizes; None where it makes no sense, and ORT says why."""
    given = attributes_of(node)
    rank = len(sizes)
    kernel, ones = list(given["kernel_shape"]), [1] * rank
    strides, dilations = given.get("strides") or ones, given.get("dilations") or ones
    auto_pad = given.get("auto_pad", b"NOTSET")
    none = [0] * (2 * rank)
    pads = list(given.get("pads") or none) if auto_pad == b"NOTSET" else none
    lengths = {len(kernel), len(strides), len(dilations), len(pads) / 2}
    if lengths != {rank} or min(*kernel, *strides, *dilations) < 1:
        return None
    if auto_pad in _SAME:
        pads = _same_pads(sizes, kernel, strides, auto_pad)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    edges = zip(sizes, kernel, spans, strides, pads[:rank], pads[rank:], strict=True)
    return _Pool(
        tuple(_Axis(*edge) for edge in edges),
        is_rounded_up=bool(given.get("ceil_mode")),
        is_same=auto_pad in _SAME,
        counts_padding=bool(node.op_type == "AveragePool" and given.get("count_include_pad")),
    )


def _same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], auto_pad: bytes
) -> list[int]:
    """What ORT pads, which counts no gaps, and crops where strides are longer than windows."""
    begins, ends = [], []
    for size, k, stride in zip(sizes, kernel, strides, strict=True):
        both = (-(-size // stride) - 1) * stride + k - size
        begins.append(int((both + (auto_pad == b"SAME_LOWER")) / 2))
        ends.append(both - begins[-1])
    return [*begins, *ends]


def _write_pads(node: onnx.NodeProto, pads: Sequence[int]) -> None:
    kept = [a for a in node.attribute if a.name not in ("auto_pad", "ceil_mode", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _declare(model: onnx.ModelProto, pool: onnx.NodeProto, kind: TensorType) -> None:
    """Declare what a pool writes, in place: values, and where they were found."""
    outputs = {value.name: value for value in model.graph.output}
    types = (kind.element_type, onnx.TensorProto.INT64)
    for name, element_type in zip(pool.output, types, strict=False):
        value = helper.make_tensor_value_info(name, element_type, kind.shape)
        if name in outputs:
            outputs[name].type.CopyFrom(value.type)
        elif name:
            model.graph.value_info.append(value)


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
