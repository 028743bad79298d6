"""Operators that compute nothing become nodes of our domain, as convolutions do. Pure.

ONNX Runtime copies for each Slice and Concat. For one image with channels last, rows are
neighbours in memory, so bands of rows can lie where the image does. And its kernel for an image
that comes channels first is slow where channels are few: 210 us for 3 x 1094 x 2048.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxsched_runtime.model import FUSED_DOMAIN, attributes_of, is_standard, node_reads
from onnxsched_runtime.moves import FINEST_NBYTES, Cut, Joined, Move, Reordered
from onnxsched_runtime.naming import unused_name
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.views import is_idle, permutation

_TILE = 16
"""ONNX Runtime's kernels swap two axes well where both are at least that long."""


def moved(source: ModelSource) -> ModelSource:
    """The lowered model with operators that executors run without a session, or not at all.

    O(nodes).

    Args:
        source: Lowered, channels last.
    """
    draft = _Draft(source)
    for node in source.model.graph.node:
        draft.take(node)
    return draft.finished()


def moved_nodes(source: ModelSource) -> dict[str, Move]:
    """What the nodes that `moved` has made do, by their names."""
    return {
        node.name: _MOVES[node.op_type](node, source)
        for node in source.model.graph.node
        if node.domain == FUSED_DOMAIN and node.op_type in _MOVES
    }


def _reordered(node: NodeProto, source: ModelSource) -> Reordered:
    values, kind = attributes_of(node), source.kind_of(node.output[0])
    steps = _steps(source.kind_of(node.input[0]).shape or ())
    start = sum(s * step for s, step in zip(values["starts"], steps, strict=True))
    strides = tuple(steps[axis] for axis in values["perm"])
    shape = kind.shape or ()
    return Reordered(node.input[0], node.output[0], shape, kind.item_nbytes, start, strides)


def _cut(node: NodeProto, source: ModelSource) -> Cut:
    values, kind = attributes_of(node), source.kind_of(node.output[0])
    row_nbytes = kind.nbytes // (kind.shape or ())[values["axis"]]
    whole = source.kind_of(node.input[0])
    start_nbytes = values["start"] * row_nbytes
    return Cut(node.input[0], node.output[0], start_nbytes, kind.nbytes, whole.nbytes)


def _joined(node: NodeProto, source: ModelSource) -> Joined:
    sizes = [source.kind_of(name).nbytes for name in node.input]
    starts = tuple(accumulate(sizes[:-1], initial=0))
    return Joined(tuple(node.input), node.output[0], starts)


_MOVES: dict[str, Callable[[NodeProto, ModelSource], Move]] = {
    "Transpose": _reordered,
    "Slice": _cut,
    "Concat": _joined,
}


def _steps(shape: Sequence[int]) -> list[int]:
    """How many numbers neighbours along each axis lie apart."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


@dataclass
class _Draft:
    """A model on its way."""

    source: ModelSource
    nodes: dict[str, NodeProto] = field(default_factory=dict)
    """By name, in the order in which they run."""
    declared: dict[str, TensorType] = field(default_factory=dict)
    """Types of new tensors."""
    joined: set[str] = field(default_factory=set)
    """What lies in a whole."""

    def __post_init__(self) -> None:
        graph = self.source.model.graph
        self.outputs = {value.name for value in graph.output}
        self.taken = {entry.name for entry in (*graph.node, *graph.initializer)}
        self.readers = Counter(t for node in graph.node for t in node_reads(node))
        self.slices: dict[str, tuple[str, str, list[int]]] = {}
        """What each Slice is called and reads, and where it begins along each axis, by what it
        writes."""

    def take(self, node: NodeProto) -> None:
        """Add a node, or what is to stand in its place."""
        if node.op_type == "Slice" and (starts := _starts(node, self.source)) is not None:
            self.slices[node.output[0]] = (node.name, node.input[0], starts)
            self._take_slice(node, starts)
        elif _fits_transpose(node, self.source):
            self._take_transpose(node)
        elif _fits_concat(node, self.source):
            self._take_concat(node)
        elif _fits_split(node, self.source):
            self._take_split(node)
        else:
            self._add(node)

    def _add(self, node: NodeProto) -> None:
        self.nodes[node.name] = node

    def _take_slice(self, node: NodeProto, starts: Sequence[int]) -> None:
        before, after = (
            self.source.kind_of(t).shape or () for t in (node.input[0], node.output[0])
        )
        cut = [
            axis for axis, sizes in enumerate(zip(before, after, strict=True)) if len({*sizes}) > 1
        ]
        axis = cut[0] if cut else 0
        if len(cut) > 1 or math.prod(before[:axis]) > 1:
            self._add(node)
        else:
            values = {"axis": axis, "start": starts[axis], "stop": starts[axis] + after[axis]}
            self._add(_made("Slice", [node.input[0]], node.output[0], node.name, **values))

    def _take_transpose(self, node: NodeProto) -> None:
        """Let it take in a Slice that no one else reads, wherever that cuts, in the place of that.

        It has the name of the Slice then, by which a schedule says where only a piece is read.
        """
        read, name = node.input[0], node.name
        sizes = self.source.kind_of(read).shape or ()
        starts = [0] * len(sizes)
        if read in self.slices and self.readers[read] == 1 and read not in self.outputs:
            name, read, starts = self.slices[read]
            del self.nodes[name]
        stops = [start + size for start, size in zip(starts, sizes, strict=True)]
        values = {"perm": permutation(node, len(sizes)), "starts": starts, "stops": stops}
        self._add(_made("Transpose", [read], node.output[0], name, **values))

    def _take_concat(self, node: NodeProto) -> None:
        """Join what has no place elsewhere; the rest is copied first."""
        axis = attributes_of(node)["axis"] % len(self.source.kind_of(node.output[0]).shape or ())
        parts = []
        for number, tensor in enumerate(node.input):
            part = tensor
            if tensor in self.joined or tensor in self.source.ends:
                name = f"{node.name}/part{number}"
                part = unused_name(name, self.source.tensors, self.declared, self.taken)
                self.declared[part] = self.source.kind_of(tensor)
                count = (self.declared[part].shape or ())[axis]
                values = {"axis": axis, "start": 0, "stop": count}
                self._add(_made("Slice", [tensor], part, part, **values))
            self.joined.add(part)
            parts.append(part)
        self._add(_made("Concat", parts, node.output[0], node.name, axis=axis))

    def _take_split(self, node: NodeProto) -> None:
        """Cut each piece by itself, so that each can be where it is read.

        ONNX Runtime makes a Split of Slices that leave nothing out.
        """
        axis = attributes_of(node).get("axis", 0) % len(
            self.source.kind_of(node.input[0]).shape or ()
        )
        start = 0
        for number, piece in enumerate(node.output):
            name = unused_name(f"{node.name}/piece{number}", self.nodes, self.taken)
            stop = start + (self.source.kind_of(piece).shape or ())[axis]
            values = {"axis": axis, "start": start, "stop": stop}
            self._add(_made("Slice", [node.input[0]], piece, name, **values))
            start = stop

    def finished(self) -> ModelSource:
        """The model, and the types of what is left."""
        model = ModelProto()
        model.CopyFrom(self.source.model)
        del model.graph.node[:]
        model.graph.node.extend(self.nodes.values())
        left = {t for node in self.nodes.values() for t in node.output}
        left |= {value.name for value in model.graph.input}
        known = {**self.source.tensors, **self.declared}
        tensors = {name: kind for name, kind in known.items() if name in left}
        return replace(self.source, model=model, tensors=tensors)


def _made(op: str, reads: list[str], writes: str, name: str, **values: Any) -> NodeProto:
    return helper.make_node(op, reads, [writes], name, domain=FUSED_DOMAIN, **values)


def _flow(node: NodeProto, source: ModelSource, reads: Sequence[str]) -> list[TensorType] | None:
    """The types of what flows through a node; None where something is stored, empty or unknown."""
    names = [*reads, *node.output]
    kinds = [source.tensors.get(name) for name in names]
    known = [kind for kind in kinds if kind is not None and kind.is_static and kind.nbytes]
    is_flow = len(known) == len(names) and not any(map(source.is_weight, reads))
    return known if is_flow and is_standard(node) else None


def _starts(node: NodeProto, source: ModelSource) -> list[int] | None:
    """Where a Slice begins along each axis; None where that is not stored, or it takes steps."""
    if len(node.input) < 3 or any(n and not source.is_weight(n) for n in node.input[1:]):
        return None  # before opset 10 bounds were attributes
    kinds = _flow(node, source, node.input[:1])
    if kinds is None:
        return None
    shape = kinds[0].shape or ()
    bounds = [numpy_helper.to_array(source.weight(n)) if n else None for n in node.input[1:]]
    starts, _, axes, steps = [*bounds, None, None][:4]
    if starts is None or (steps is not None and np.any(steps != 1)):
        return None
    found = [0] * len(shape)
    for place, axis in enumerate(range(len(starts)) if axes is None else axes):
        found[axis] = slice(int(starts[place]), None).indices(shape[axis])[0]
    return found


def _fits_transpose(node: NodeProto, source: ModelSource) -> bool:
    """Whether ONNX Runtime's kernel for a Transpose is slow, as where few channels become last."""
    if node.op_type != "Transpose" or (kinds := _flow(node, source, node.input)) is None:
        return False
    shape = kinds[0].shape or ()
    perm = [axis for axis in permutation(node, len(shape)) if shape[axis] > 1]
    if is_idle(node, shape) or perm[-1] == max(perm):
        return False
    runs = [math.prod(shape[axis] for axis in run) for run in _runs(perm)]
    return len(runs) < 4 and min(runs[-2:]) < _TILE


def _runs(perm: Sequence[int]) -> list[list[int]]:
    """Axes that stay side by side, together."""
    order = sorted(perm)
    runs: list[list[int]] = []
    for axis in perm:
        if runs and order.index(axis) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs


def _fits_concat(node: NodeProto, source: ModelSource) -> bool:
    """Whether the parts of a Concat are neighbours in memory, and each begins where it may."""
    if node.op_type != "Concat" or (kinds := _flow(node, source, node.input)) is None:
        return False
    return _are_neighbours(kinds[:-1], kinds[-1], attributes_of(node)["axis"])


def _fits_split(node: NodeProto, source: ModelSource) -> bool:
    """Whether the pieces of a Split are neighbours in memory, and each begins where it may."""
    if node.op_type != "Split" or (kinds := _flow(node, source, node.input[:1])) is None:
        return False
    return _are_neighbours(kinds[1:], kinds[0], attributes_of(node).get("axis", 0))


def _are_neighbours(parts: Sequence[TensorType], whole: TensorType, axis: int) -> bool:
    shape = whole.shape or ()
    starts = accumulate([part.nbytes for part in parts[:-1]])
    is_aligned = all(start % FINEST_NBYTES == 0 for start in starts)
    return len(parts) > 1 and is_aligned and math.prod(shape[: axis % len(shape)]) == 1
