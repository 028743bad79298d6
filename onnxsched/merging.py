"""One operator in place of siblings, and pieces of its result under their old names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxsched.drafting import Draft, with_size
from onnxsched.graph_view import GraphView, is_elementwise, kind_of
from onnxsched.siblings import Sibling, Window
from onnxsched_runtime.annotation import attribute_digests

_SPLIT_SIZES_OPSET = 13
"""From here on a Split takes its sizes as an input, before as an attribute."""


@dataclass(frozen=True)
class _Step:
    """An elementwise operator that comes after each of the siblings, to be one after all."""

    node: onnx.NodeProto
    replaced: tuple[onnx.NodeProto, ...]
    tails: tuple[str, ...]
    """Where the siblings' results are afterwards."""
    bias: np.ndarray | None
    """What it adds to each channel, where it does."""


def merge(draft: Draft, group: Sequence[Sibling]) -> None:
    """Replace siblings by one operator, and what all have after them by one of each.

    The result goes into the Concat that joins all pieces again where there is one; else a Split
    gives every piece its old name.
    """
    view = draft.view
    counts = [sibling.channel_count for sibling in group]
    tails = tuple(sibling.node.output[0] for sibling in group)
    shape = view.model.tensors[tails[0]].shape or ()
    axis = 1 if group[0].window else len(shape) - 1
    place = min((s.node for s in group), key=lambda node: view.position[node.name])
    nodes = [_merged_operator(draft, group, place, axis)]
    draft.removed.update(sibling.node.name for sibling in group)
    while step := _next_step(view, tails, axis, counts):
        nodes.append(_merged_step(draft, step, nodes[-1].output[0]))
        draft.removed.update(node.name for node in step.replaced)
        tails = step.tails
    if not _joined(draft, nodes[-1], tails, axis):
        nodes.append(_split(draft, nodes[-1].output[0], tails, axis, counts))
    draft.added.setdefault(place.name, []).extend(nodes)


def _merged_operator(
    draft: Draft, group: Sequence[Sibling], place: onnx.NodeProto, axis: int
) -> onnx.NodeProto:
    """One operator with the weights of all, that reads what the first in the model reads."""
    view, name = draft.view, f"{place.name}/merged"
    windows = [sibling.window for sibling in group if sibling.window]
    window = _common_window(windows) if windows else None
    arrays = [_padded(view.array(s.node.input[1]), s.window, window) for s in group]
    node = onnx.NodeProto()
    node.CopyFrom(place)
    node.name = name
    weight = draft.store(f"{name}/weight", np.concatenate(arrays, group[0].weight_axis))
    node.input[:] = [place.input[0], weight]
    if any(sibling.bias for sibling in group):
        node.input.append(draft.store(f"{name}/bias", _biases(view, group, arrays[0].dtype)))
    if window:
        kept = [a for a in node.attribute if a.name not in ("kernel_shape", "pads")]
        if not any(a.name == "auto_pad" and a.s != b"NOTSET" for a in kept):
            kept.append(helper.make_attribute("pads", [*window.begins, *window.ends]))
        kept.append(helper.make_attribute("kernel_shape", window.kernel))
        del node.attribute[:]
        node.attribute.extend(kept)
    kind = view.model.tensors[place.output[0]]
    count = sum(sibling.channel_count for sibling in group)
    node.output[:] = [draft.declare(f"{place.output[0]}/merged", with_size(kind, axis, count))]
    return node


def _common_window(windows: Sequence[Window]) -> Window:
    """The smallest window that all kernels fit into."""
    begins = tuple(map(max, zip(*(window.begins for window in windows), strict=True)))
    ends = tuple(map(max, zip(*(window.ends for window in windows), strict=True)))
    first = windows[0]
    margins = _margins(first, begins, ends)
    kernel = tuple(k + sum(m) for k, m in zip(first.kernel, margins, strict=True))
    return replace(first, kernel=kernel, begins=begins, ends=ends)


def _margins(window: Window, begins: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """How many zeros before and behind a kernel make up for more padding."""
    rows = zip(window.dilations, begins, window.begins, ends, window.ends, strict=True)
    return [((b - own_b) // d, (e - own_e) // d) for d, b, own_b, e, own_e in rows]


def _padded(weight: np.ndarray, own: Window | None, window: Window | None) -> np.ndarray:
    if own is None or window is None or own == window:
        return weight
    return np.pad(weight, [(0, 0), (0, 0), *_margins(own, window.begins, window.ends)])


def _biases(view: GraphView, group: Sequence[Sibling], dtype: np.dtype[Any]) -> np.ndarray:
    """All that siblings add, zero where one adds nothing."""
    parts = (
        view.array(s.bias).reshape(-1) if s.bias else np.zeros(s.channel_count, dtype)
        for s in group
    )
    return np.concatenate(list(parts))


def _next_step(
    view: GraphView, tails: Sequence[str], axis: int, counts: Sequence[int]
) -> _Step | None:
    """The elementwise operator that comes next after every piece; None where they differ."""
    readers = [node for tail in tails if (node := view.only_reader(tail)) is not None]
    if relus := [node for node in readers if kind_of(node) == ("", "Relu")]:
        return _rectification(view, relus, tails)
    nodes = [node for node in readers if is_elementwise(view, node)]
    if len(nodes) < len(tails) or len({_form(view, node) for node in nodes}) > 1:
        return None
    ends = tuple(node.output[0] for node in nodes)
    types = view.model.tensors
    if any(types.get(end) != types.get(tail) for end, tail in zip(ends, tails, strict=True)):
        return None
    if not any(name in view.weights for name in nodes[0].input):
        return _Step(nodes[0], tuple(nodes), ends, None)
    rank = len(types[tails[0]].shape or ())
    arrays = [
        _channel_bias(view, *row, axis - rank, rank)
        for row in zip(nodes, tails, counts, strict=True)
    ]
    found = [array for array in arrays if array is not None]
    if len(found) < len(arrays):
        return None
    bias = np.concatenate(found).reshape(-1, *(1,) * (rank - 1 - axis))
    return _Step(nodes[0], tuple(nodes), ends, bias)


def _form(view: GraphView, node: onnx.NodeProto) -> tuple[object, ...]:
    """Equal for nodes that do the same but for the values that they add."""
    stored = [view.weights[name].data_type for name in node.input if name in view.weights]
    return (kind_of(node), tuple(attribute_digests(node)), tuple(stored))


def _rectification(
    view: GraphView, relus: Sequence[onnx.NodeProto], tails: Sequence[str]
) -> _Step | None:
    """One Relu for all, where those that have none yet go through one later anyway."""
    own = {node.input[0]: node.output[0] for node in relus}
    if not all(tail in own or _is_rectified_later(view, tail) for tail in tails):
        return None
    return _Step(relus[0], tuple(relus), tuple(own.get(tail, tail) for tail in tails), None)


def _is_rectified_later(view: GraphView, tensor: str) -> bool:
    """Whether all that reads a tensor is a Relu, or a Concat or maximum that leads to Relus."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        read = waiting.pop()
        readers = view.readers.get(read, [])
        if not readers or read in view.outputs:
            return False
        for node in readers:
            if kind_of(node) == ("", "Relu"):
                continue
            if not _chooses(node):
                return False
            if node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append(node.output[0])
    return True


def _chooses(node: onnx.NodeProto) -> bool:
    """Whether all that a node writes are numbers that it reads."""
    return kind_of(node) in (("", "Concat"), ("", "MaxPool")) and len(node.output) == 1


def _channel_bias(
    view: GraphView, node: onnx.NodeProto, tail: str, count: int, axis: int, rank: int
) -> np.ndarray | None:
    """The numbers that a node adds, one a channel; None where it adds anything else.

    Args:
        view: The model.
        node: An elementwise operator with one weight.
        tail: What it reads.
        count: How many channels there are.
        axis: Theirs, negative.
        rank: Of the tensor.
    """
    if node.op_type != "Add" and node.input[0] != tail:
        return None
    array = view.array(next(name for name in node.input if name in view.weights))
    shape = [1] * rank
    shape[axis] = count
    if [1] * (rank - array.ndim) + list(array.shape) != shape:
        return None
    return array.reshape(-1)


def _merged_step(draft: Draft, step: _Step, tensor: str) -> onnx.NodeProto:
    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    node.name = f"{step.node.name}/merged"
    node.input[:] = [tensor]
    if step.bias is not None:
        node.input.append(draft.store(f"{node.name}/bias", step.bias))
    node.output[:] = [draft.declare(f"{step.node.output[0]}/merged", draft.tensors[tensor])]
    return node


def _joined(draft: Draft, last: onnx.NodeProto, tails: Sequence[str], axis: int) -> bool:
    """Let the Concat of all pieces read them as one, or drop it if it reads nothing else.

    Returns:
        Whether there is one that reads them side by side in this order.
    """
    view = draft.view
    concat = view.only_reader(tails[0])
    if concat is None or kind_of(concat) != ("", "Concat"):
        return False
    if any(view.only_reader(tail) is None for tail in tails):
        return False
    concat = draft.changed.get(concat.name, concat)
    inputs, result = list(concat.input), view.model.tensors.get(concat.output[0])
    if tails[0] not in inputs or result is None or result.shape is None:
        return False
    start = inputs.index(tails[0])
    count = len(tails)
    given = next(a.i for a in concat.attribute if a.name == "axis")
    if inputs[start : start + count] != list(tails) or given % len(result.shape) != axis:
        return False
    if set(tails) & {*inputs[:start], *inputs[start + count :]}:
        return False
    if len(inputs) == count:
        draft.removed.add(concat.name)
        del draft.tensors[last.output[0]]
        last.output[:] = concat.output
        return True
    node = onnx.NodeProto()
    node.CopyFrom(concat)
    node.input[:] = [*inputs[:start], last.output[0], *inputs[start + count :]]
    draft.changed[concat.name] = node
    return True


def _split(
    draft: Draft, tensor: str, tails: Sequence[str], axis: int, counts: Sequence[int]
) -> onnx.NodeProto:
    """The pieces of a tensor under the names that they are read by."""
    name = f"{tensor}/split"
    if draft.view.opset < _SPLIT_SIZES_OPSET:
        return helper.make_node("Split", [tensor], tails, name, axis=axis, split=counts)
    sizes = draft.store(f"{name}/sizes", np.array(counts, np.int64))
    return helper.make_node("Split", [tensor, sizes], tails, name, axis=axis)
