"""Convolutions with as many channels as fast kernels are made for; the added ones are 0.

cuDNN has kernels for tensor cores where channels come in groups of 4 (TF32) or 8 (half precision),
and its heuristics choose well among them where they come in groups of 32. On an H200 a convolution
of 24 channels of 14x14 takes 13.2 us, one of 32 channels 5.6 us.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from onnxsched.drafting import Draft, assembled, with_size
from onnxsched.graph_view import POOLS, GraphView, is_dense_convolution, is_elementwise, kind_of
from onnxsched.loading import Model

_GROUP = 32
_MOST_FLOPS = 5e8
"""Of a convolution with the added channels: smaller ones hardly take longer for more of them."""
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


@dataclass(frozen=True)
class Passage:
    """Channels that one convolution writes for others, which nothing else reads."""

    first: onnx.NodeProto
    between: tuple[onnx.NodeProto, ...]
    """Elementwise operators and pools, which leave channels what they are."""
    readers: tuple[onnx.NodeProto, ...]
    """The other convolutions."""
    channel_count: int
    """With those that are added."""


def find_passages(view: GraphView) -> list[Passage]:
    """Where channels that no fast kernel is made for can be added to, in the model's order.

    O(nodes).
    """
    found = (_passage(view, node) for node in view.model.proto.graph.node)
    return [passage for passage in found if passage is not None]


def aligned(model: Model) -> Model:
    """The model with channels between its convolutions in groups of 32, with equal results.

    O(nodes and bytes of weights).
    """
    draft = Draft(GraphView(model))
    passages, names = find_passages(draft.view), {}
    for passage in passages:
        for node in (passage.first, *passage.between):
            kind = with_size(model.tensors[node.output[0]], 1, passage.channel_count)
            names[node.output[0]] = draft.declare(f"{node.output[0]}/aligned", kind)
    written = {passage.first.name: passage.channel_count for passage in passages}
    read = {node.name: passage.channel_count for passage in passages for node in passage.readers}
    changed = [node for p in passages for node in (p.first, *p.between, *p.readers)]
    for node in {node.name: node for node in changed}.values():
        counts = (written.get(node.name), read.get(node.name))
        draft.changed[node.name] = _widened(draft, node, names, counts)
    return assembled(draft, model.rewrite)


def _passage(view: GraphView, first: onnx.NodeProto) -> Passage | None:
    """What a convolution writes, as channels for the next one."""
    if not _is_dense(view, first):
        return None
    count = view.weights[first.input[1]].dims[0]
    more = -(-count // _GROUP) * _GROUP
    if more == count or more > 2 * count:
        return None
    between: list[onnx.NodeProto] = []
    tensor = first.output[0]
    while not (readers := _convolutions_after(view, tensor)):
        node = view.only_reader(tensor)
        if node is None or not _leaves_channels(view, node):
            return None
        between.append(node)
        tensor = node.output[0]
    growth = more / count
    is_small = all(growth * _flops(view, node) <= _MOST_FLOPS for node in readers)
    return Passage(first, tuple(between), readers, more) if is_small else None


def _convolutions_after(view: GraphView, tensor: str) -> tuple[onnx.NodeProto, ...]:
    """The convolutions that read a tensor; none where something else does, or the caller."""
    readers = view.readers.get(tensor, [])
    is_sole = tensor not in view.outputs and all(_is_dense(view, node) for node in readers)
    return tuple(readers) if is_sole else ()


def _leaves_channels(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node computes each channel of one tensor by itself, all in the same way."""
    if kind_of(node) in POOLS:
        return len(node.output) == 1
    return len(node.input) == 1 and is_elementwise(view, node)


def _flops(view: GraphView, node: onnx.NodeProto) -> float:
    """Operations of a convolution."""
    shape = view.model.tensors[node.output[0]].shape or ()
    filters, points = view.weights[node.input[1]].dims, (shape[0], *shape[2:])
    return float(2 * math.prod(filters) * math.prod(points))


def _is_dense(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution of all channels that there are fast kernels for."""
    is_dense = is_dense_convolution(view, node)
    return is_dense and view.weights[node.input[1]].data_type in _FLOATS


def _widened(
    draft: Draft,
    node: onnx.NodeProto,
    names: Mapping[str, str],
    counts: tuple[int | None, int | None],
) -> onnx.NodeProto:
    """A node between wider tensors: a convolution writes and reads so many channels."""
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    wide.input[0] = names.get(node.input[0], node.input[0])
    wide.output[0] = names.get(node.output[0], node.output[0])
    if kind_of(node) == ("", "Conv"):
        for position, name in enumerate(node.input[1:], start=1):
            array = draft.view.array(name)
            for axis, count in zip(range(array.ndim), counts, strict=False):
                array = _padded(array, axis, count or array.shape[axis])
            wide.input[position] = draft.store(f"{name}/wide", array)
    return wide


def _padded(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count - array.shape[axis])
    return np.pad(array, widths)
