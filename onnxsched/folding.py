"""The first convolution of images: blocks of 2x2 pixels with 16 channels instead of pixels with 3.

A convolution that moves by two pixels is one that moves by one block. Images have too few channels
for tensor cores: on an H200 a 7x7 convolution of 224x224x3 takes 17.7 us, the same of 4x4 blocks
with 16 channels 10.0 us.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsched.drafting import Draft, assembled
from onnxsched.graph_view import GraphView, is_dense_convolution
from onnxsched.loading import Model
from onnxsched_runtime.model import attributes_of
from onnxsched_runtime.tensor import TensorType

_BLOCK = 2
_GROUP = 16
"""Channels of a block, with those that only fill it up: fewer make kernels slow again."""
_MOST_CHANNELS = 4
_MOST_NUMBERS = 1 << 20
"""That are read by their stored places, of which each takes eight bytes."""
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


@dataclass(frozen=True)
class Stem:
    """A convolution of images that moves by two pixels."""

    node: onnx.NodeProto
    shape: tuple[int, ...]
    """Of the image: (images, channels, height, width)."""
    kernel: tuple[int, int]
    """Blocks."""
    margins: tuple[int, int]
    """Rows and columns of zeros before the filters, so that they begin with a block."""
    pads: tuple[int, ...]
    """Blocks before each dimension, then behind each."""


def find_stems(view: GraphView) -> list[Stem]:
    """The convolutions that can be folded, in the model's order. O(nodes)."""
    found = (_stem(view, node) for node in view.model.proto.graph.node)
    return [stem for stem in found if stem is not None]


def folded(model: Model) -> Model:
    """The model with its first convolutions on blocks of pixels, with equal results.

    O(nodes and pixels).
    """
    draft = Draft(GraphView(model))
    for stem in find_stems(draft.view):
        _fold(draft, stem)
    return assembled(draft, model.rewrite)


def _stem(view: GraphView, node: onnx.NodeProto) -> Stem | None:
    if not _moves_by_blocks(view, node):
        return None
    shape, kernel = _shape(view, node), view.weights[node.input[1]].dims[2:]
    pads = attributes_of(node).get("pads", [0] * 4)
    margins = [begin % _BLOCK for begin in pads[:2]]
    rows = list(zip(shape[2:], kernel, margins, pads[:2], pads[2:], strict=True))
    blocks = [-(-(size + margin) // _BLOCK) for _, size, margin, _, _ in rows]
    before = [(begin + margin) // _BLOCK for _, _, margin, begin, _ in rows]
    counts = [(length + begin + end - size) // _BLOCK + 1 for length, size, _, begin, end in rows]
    behind = [
        count - 1 - first + block - length // _BLOCK
        for count, first, block, length in zip(counts, before, blocks, shape[2:], strict=True)
    ]
    if min(behind) < 0:
        return None
    return Stem(node, shape, (blocks[0], blocks[1]), (margins[0], margins[1]), (*before, *behind))


def _moves_by_blocks(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution of images that can be read in blocks."""
    if not is_dense_convolution(view, node):
        return False
    shape, weight, values = _shape(view, node), view.weights[node.input[1]], attributes_of(node)
    return (
        weight.data_type in _FLOATS
        and len(shape) == 4
        and shape[1] <= _MOST_CHANNELS
        and not any(size % _BLOCK for size in shape[2:])
        and values.get("auto_pad", b"NOTSET") == b"NOTSET"
        and list(values.get("strides", [1, 1])) == [_BLOCK, _BLOCK]
        and list(values.get("dilations", [1, 1])) == [1, 1]
        and min(weight.dims[2:]) > _BLOCK
        and shape[0] * _GROUP * shape[2] * shape[3] // _BLOCK**2 <= _MOST_NUMBERS
    )


def _shape(view: GraphView, node: onnx.NodeProto) -> tuple[int, ...]:
    """Of the image that a node reads."""
    return view.model.tensors[node.input[0]].shape or ()


def _fold(draft: Draft, stem: Stem) -> None:
    """Read the image in blocks, by a Gather, and convolve these."""
    node, name = stem.node, stem.node.input[0]
    images, _, height, width = stem.shape
    kind = draft.view.model.tensors[name]
    flat = draft.declare(f"{name}/flat", TensorType(kind.element_type, (math.prod(stem.shape),)))
    size = (images, _GROUP, height // _BLOCK, width // _BLOCK)
    blocks = draft.declare(f"{name}/blocks", TensorType(kind.element_type, size))
    shape = draft.store(f"{name}/length", np.array([-1], np.int64))
    places = draft.store(f"{name}/places", _places(stem))
    filters = draft.store(f"{node.input[1]}/folded", _filters(stem, draft.view))
    own = draft.added.setdefault(node.name, [])
    own.append(helper.make_node("Reshape", [name, shape], [flat], f"{node.name}/flat"))
    own.append(helper.make_node("Gather", [flat, places], [blocks], f"{node.name}/blocks", axis=0))
    draft.changed[node.name] = helper.make_node(
        "Conv",
        [blocks, filters, *node.input[2:]],
        list(node.output),
        node.name,
        kernel_shape=stem.kernel,
        pads=stem.pads,
    )


def _places(stem: Stem) -> np.ndarray:
    """Where in the image each number of each block lies; the last channels read any of it."""
    places = np.arange(math.prod(stem.shape), dtype=np.int64)
    blocks = _in_blocks(places.reshape(stem.shape))
    filling = np.repeat(blocks[:, :1], _GROUP - blocks.shape[1], axis=1)
    return np.concatenate([blocks, filling], axis=1)


def _in_blocks(array: np.ndarray) -> np.ndarray:
    """[n, c, h, w] with each block of neighbours in its channels: [n, 4c, h / 2, w / 2]."""
    count, channels, height, width = array.shape
    rows, columns = height // _BLOCK, width // _BLOCK
    split = array.reshape(count, channels, rows, _BLOCK, columns, _BLOCK)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(count, -1, rows, columns)


def _filters(stem: Stem, view: GraphView) -> np.ndarray:
    """The filters for blocks: 0 for what only fills them up."""
    array = view.array(stem.node.input[1])
    margins = [
        (margin, k * _BLOCK - own - margin)
        for margin, k, own in zip(stem.margins, stem.kernel, array.shape[2:], strict=True)
    ]
    blocks = _in_blocks(np.pad(array, [(0, 0), (0, 0), *margins]))
    return np.pad(blocks, [(0, 0), (0, _GROUP - blocks.shape[1]), (0, 0), (0, 0)])
