"""Biases of convolutions that wait until an Add takes them in for nothing.

Where a convolution's bias is a kernel of its own, it costs as much as any other small kernel. A
constant that is added to a tensor can wait, though: Relu(x + k) is Max(x, -k) + k, a convolution
of k is another constant, and where two tensors are added, ONNX Runtime sums a third, stored one,
in the same kernel. So tensors are taken apart into what the model computes and a known offset,
from the convolution whose bias it was to the next sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsched.drafting import Draft, assembled
from onnxsched.graph_view import POOLS, GraphView, kind_of
from onnxsched.loading import Model
from onnxsched.rows import explicit_window
from onnxsched_runtime.model import attributes_of
from onnxsched_runtime.pools import may_see_padding_alone
from onnxsched_runtime.tensor import TensorType

_LEAST_ROOM_NBYTES = 32 << 20
_ROOM_SHARE = 0.2
"""Of the weights' size: so much may be stored for sums."""
_MOST_ADDENDS = 8
"""ONNX Runtime sums more in several kernels."""
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
_MIN_OPSET = 8
"""From here on Max and Sum broadcast."""


@dataclass(frozen=True)
class Deferrals:
    """Which biases can wait, and for which sums."""

    view: GraphView
    sums: frozenset[str]
    """Names of the Adds that a stored offset may be added in."""
    known: dict[tuple[str, bool], bool] = field(default_factory=dict)

    def can_wait(self, tensor: str, is_map: bool) -> bool:
        """Whether all that reads a tensor can do so without its offset.

        Args:
            tensor: A tensor of the model.
            is_map: Whether the offset differs from place to place, not only by channel.
        """
        key = (tensor, is_map)
        if key not in self.known:
            readers = self.view.readers.get(tensor, [])
            is_read = bool(readers) and tensor not in self.view.outputs
            self.known[key] = is_read and all(self._takes(n, tensor, is_map) for n in readers)
        return self.known[key]

    def _takes(self, node: onnx.NodeProto, tensor: str, is_map: bool) -> bool:
        """Whether a node can read a tensor without its offset."""
        kind, result = kind_of(node), node.output[0]
        if kind == ("", "Add"):
            return node.name in self.sums
        if kind == ("", "Mul"):
            return _factor(self.view, node) is not None and self.can_wait(result, is_map)
        if kind == ("", "Relu"):
            return not is_map and self.can_wait(result, is_map)
        if kind in POOLS:
            is_kept = len(node.output) == 1 and not attributes_of(node).get("count_include_pad")
            is_kept &= not may_see_padding_alone(node)
            return is_kept and not is_map and self.can_wait(result, is_map)
        if not _is_stored_convolution(self.view, node) or node.input[0] != tensor:
            return False
        if is_map or _is_padded(self.view, node):
            return self.can_wait(result, is_map=True)
        return len(node.input) == 3  # it adds the offset with its own bias, or lets both wait


def find_deferrals(view: GraphView) -> tuple[Deferrals, tuple[str, ...]]:
    """What can wait in a model, and the convolutions whose biases do.

    Only for one image: a stored offset is as large as the tensor that it is added to. What is
    stored for sums stays below a fifth of the weights, or 32 MiB. O(nodes and edges).
    """
    if view.opset < _MIN_OPSET:
        return Deferrals(view, frozenset()), ()
    sizes = (TensorType(w.data_type, tuple(w.dims)).nbytes for w in view.weights.values())
    room = max(_LEAST_ROOM_NBYTES, _ROOM_SHARE * sum(sizes))
    sums = set()
    for node in view.model.proto.graph.node:
        if not _is_sum(view, node):
            continue
        room -= view.model.tensors[node.output[0]].nbytes
        if room < 0:
            break
        sums.add(node.name)
    deferrals = Deferrals(view, frozenset(sums))
    for node in reversed(view.model.proto.graph.node):  # so that no question leads to many others
        for tensor in node.output:
            for is_map in (True, False):
                deferrals.can_wait(tensor, is_map)
    waiting = [
        node.name
        for node in view.model.proto.graph.node
        if _is_stored_convolution(view, node)
        and len(node.input) == 3
        and deferrals.can_wait(node.output[0], is_map=False)
    ]
    return deferrals, tuple(waiting)


@dataclass(frozen=True)
class _Waiting:
    """What tensors of the model are without yet, by name."""

    offsets: dict[str, np.ndarray] = field(default_factory=dict)
    """Of shape [1, channels, height, width], or with ones for what does not matter."""
    addends: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What an Add that a later one takes in would have added."""


def deferred(model: Model) -> Model:
    """The model whose biases wait for the sums that take them in, and sums for larger ones.

    Equal within rounding. O(nodes and arithmetic on the biases).
    """
    draft = Draft(GraphView(model))
    deferrals, _ = find_deferrals(draft.view)
    waiting = _Waiting()
    for node in model.proto.graph.node:
        kind = kind_of(node)
        if _is_stored_convolution(draft.view, node):
            _convolve(draft, deferrals, node, waiting.offsets)
        elif kind == ("", "Add"):
            _add(draft, deferrals, node, waiting)
        elif kind == ("", "Relu"):
            _rectify(draft, node, waiting.offsets)
        else:
            _carry(draft.view, node, waiting.offsets)
    return assembled(draft, model.rewrite)


def _is_stored_convolution(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution of an image with stored weights."""
    stored = all(name in view.weights for name in node.input[1:])
    result = view.model.tensors.get(node.output[0]) if kind_of(node) == ("", "Conv") else None
    if result is None or not stored or node.input[0] in view.weights:
        return False
    return result.shape is not None and len(result.shape) == 4


def _is_sum(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node adds two images of one shape, of a type that Sum takes."""
    types = [view.model.tensors.get(name) for name in (*node.input, node.output[0])]
    first = types[0]
    if kind_of(node) != ("", "Add") or first is None or any(kind != first for kind in types):
        return False
    is_image = first.shape is not None and len(first.shape) == 4 and first.shape[0] == 1
    return is_image and first.element_type in _FLOATS


def _factor(view: GraphView, node: onnx.NodeProto) -> float | None:
    """The one number that a Mul multiplies with; None where it does anything else."""
    stored = [name for name in node.input if name in view.weights]
    if len(stored) != 1 or len(view.weights[stored[0]].dims) > 4:
        return None
    if view.array(stored[0]).size != 1:
        return None
    return float(view.array(stored[0]).reshape(()))


def _is_padded(view: GraphView, node: onnx.NodeProto) -> bool:
    window = explicit_window(view, node)
    return any((*window.begins, *window.ends))


def _convolve(
    draft: Draft, deferrals: Deferrals, node: onnx.NodeProto, offsets: dict[str, np.ndarray]
) -> None:
    """A convolution of the offset; what can't wait is its bias."""
    view, result = draft.view, node.output[0]
    before = offsets.get(node.input[0])
    if before is None and len(node.input) < 3:
        return
    weight = view.array(node.input[1])
    after = np.zeros((1, len(weight), 1, 1))
    if len(node.input) == 3:
        after = after + view.array(node.input[2]).astype(np.float64).reshape(1, -1, 1, 1)
    if before is not None:
        after = after + _convolved(view, node, before)
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    if deferrals.can_wait(result, is_map=after.shape[2:] != (1, 1)):
        offsets[result] = after
        changed.input[:] = node.input[:2]
    elif before is not None:
        bias = draft.store(f"{node.name}/bias", after.reshape(-1).astype(weight.dtype))
        changed.input[:] = [*node.input[:2], bias]
    else:
        return
    draft.changed[node.name] = changed


def _convolved(view: GraphView, node: onnx.NodeProto, offset: np.ndarray) -> np.ndarray:
    """A constant image, or one constant a channel, convolved."""
    weight = view.array(node.input[1]).astype(np.float64)
    shape = view.model.tensors[node.input[0]].shape or ()
    window = explicit_window(view, node)
    if offset.shape[2:] == (1, 1) and not _is_padded(view, node):
        points = np.broadcast_to(offset, (*offset.shape[:2], *weight.shape[2:]))
        strides: tuple[int, ...] = (1, 1)
        dilations: tuple[int, ...] = (1, 1)
    else:
        margins = tuple(zip(window.begins, window.ends, strict=True))
        points = np.pad(np.broadcast_to(offset, shape), ((0, 0), (0, 0), *margins))
        strides, dilations = window.strides, window.dilations
    spans = [(size - 1) * d + 1 for size, d in zip(weight.shape[2:], dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(points[0], spans, axis=(1, 2))
    views = views[:, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    groups = attributes_of(node).get("group", 1)
    parts = zip(np.split(views, groups), np.split(weight, groups), strict=True)
    images = [np.tensordot(part, view, axes=([1, 2, 3], [0, 3, 4])) for view, part in parts]
    return np.concatenate(images)[None]


def _add(draft: Draft, deferrals: Deferrals, node: onnx.NodeProto, waiting: _Waiting) -> None:
    """One sum of what is added here and in Adds before, with the offsets of all."""
    view, result = draft.view, node.output[0]
    addends = [part for name in node.input for part in waiting.addends.get(name, (name,))]
    found = [waiting.offsets[name] for name in node.input if name in waiting.offsets]
    reader = view.only_reader(result)
    is_inner = reader is not None and reader.name in deferrals.sums
    if is_inner and node.name in deferrals.sums and len(addends) < _MOST_ADDENDS - 1:
        waiting.addends[result] = tuple(addends)
        if found:
            waiting.offsets[result] = sum(found, np.zeros(()))
        draft.removed.add(node.name)
        return
    if found:
        kind = view.model.tensors[result]
        total = np.broadcast_to(sum(found, np.zeros(())), kind.shape or ())
        addends.append(draft.store(f"{node.name}/offset", total.astype(_dtype(kind))))
    if len(addends) > len(node.input):
        draft.changed[node.name] = helper.make_node("Sum", addends, node.output, node.name)


def _rectify(draft: Draft, node: onnx.NodeProto, offsets: dict[str, np.ndarray]) -> None:
    """Relu(x + k) is Max(x, -k) + k."""
    offset = offsets.get(node.input[0])
    if offset is None:
        return
    floor = (-offset).astype(_dtype(draft.view.model.tensors[node.output[0]]))
    names = [node.input[0], draft.store(f"{node.name}/floor", floor)]
    draft.changed[node.name] = helper.make_node("Max", names, node.output, node.name)
    offsets[node.output[0]] = -floor.astype(np.float64)


def _carry(view: GraphView, node: onnx.NodeProto, offsets: dict[str, np.ndarray]) -> None:
    """A node that keeps the offset of what it reads, or multiplies it."""
    found = [offsets[name] for name in node.input if name in offsets]
    if found:
        factor = _factor(view, node) if kind_of(node) == ("", "Mul") else None
        offsets[node.output[0]] = found[0] if factor is None else found[0] * factor


def _dtype(kind: TensorType) -> np.dtype[Any]:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(kind.element_type)
    return dtype
