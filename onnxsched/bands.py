"""Images cut into bands of rows, each of which goes through the operators on its own.

A band needs some rows of its neighbours, its halo: within a group of operators it computes them
itself, between groups it reads them from its neighbours. Spatial partitioning with halos, as in
distributed training (Dryden et al., IPDPS 2019), here in standard operators for one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from onnxsched.drafting import Draft, assembled, with_size
from onnxsched.fitting import fit
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.rows import (
    HEIGHT_AXIS,
    Rows,
    RowWindow,
    common,
    height_of,
    hull,
    image_inputs,
    owned_rows,
    row_window,
)

Groups = Sequence[Sequence[str]]
"""Names of nodes, each in one group at most."""


@dataclass(frozen=True)
class BandPlan:
    """Which rows each band has, for operators in groups; made by `plan_bands`."""

    count: int
    group_of: Mapping[str, int]
    """By node name."""
    windows: Mapping[str, RowWindow]
    """By node name."""
    made: Mapping[str, tuple[Rows, ...]]
    """The rows that each band computes, by tensor that a group makes."""
    held: Mapping[tuple[int, str], tuple[Rows, ...]]
    """The rows that each band of a group has of a tensor from outside the group."""
    joined: frozenset[str]
    """Tensors of groups that other operators, or the caller, read as a whole."""


def banded(model: Model, groups: Groups, count: int) -> Model:
    """The model with groups of operators in bands: equal within rounding of each convolution.

    Every operator of a group becomes `count`, called `NAME/band0` and so on, which share its
    weights; what others read is joined under its old name. Only standard operators are added, and
    the same model is always rewritten to the same nodes and names. O(nodes * count).

    Args:
        model: A portable model.
        groups: Operators that `row_window` knows; halos are exchanged where one group reads from
            another.
        count: Bands, at most as many as any tensor at the border of a group has rows.

    Raises:
        ValueError: An operator can't be cut, or an image has too few rows.
    """
    draft = Draft(GraphView(model))
    cutting = _Cutting(draft, plan_bands(draft.view, groups, count))
    for node in model.proto.graph.node:
        if node.name in cutting.plan.group_of:
            cutting.cut(node)
    return assembled(draft, f"bands-{count}")


def plan_bands(view: GraphView, groups: Groups, count: int) -> BandPlan:
    """Which rows each band needs, so that every result is there once, and no more than that.

    From the end of each group back to its start: what is read for the rows that a band answers
    for. Then forward: all that can be computed from those, since to cut a surplus off costs a
    copy; it is cut off where tensors of one height are needed. Takes O(n * (count + log(n))) for
    groups of n operators.

    Raises:
        ValueError: An operator can't be cut, or an image has too few rows.
    """
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    nodes = view.in_order(group_of)
    windows = {node.name: _window(view, node, count) for node in nodes}
    joined = frozenset(
        tensor for node in nodes for tensor in node.output if _is_joined(view, group_of, tensor)
    )
    plan = BandPlan(count, group_of, windows, {}, {}, joined)
    needs = [_needed(view, plan, nodes, band) for band in range(count)]
    made: dict[str, tuple[Rows, ...]] = {}
    held: dict[tuple[int, str], tuple[Rows, ...]] = {}
    for node in nodes:
        group, window = group_of[node.name], windows[node.name]
        inputs = image_inputs(view, node)
        for tensor in inputs:
            if not _is_inside(view, group_of, group, tensor):
                need = [needs[band][group, tensor] for band in range(count)]
                own = made.get(tensor, need)
                held[group, tensor] = tuple(map(hull, zip(need, own, strict=True)))
        made[node.output[0]] = tuple(
            window.writes(
                common([(held.get((group, t)) or made[t])[band] for t in inputs]),
                height_of(view, inputs[0]),
            )
            for band in range(count)
        )
    return replace(plan, made=made, held=held)


def _window(view: GraphView, node: onnx.NodeProto, count: int) -> RowWindow:
    window = row_window(view, node)
    if window is None or height_of(view, node.output[0]) < count:
        raise ValueError(f"'{node.name}' can't be cut into {count} bands")
    return window


def _is_joined(view: GraphView, group_of: Mapping[str, int], tensor: str) -> bool:
    """Whether anyone needs a tensor as a whole, or, at a dead end, no one needs any of it."""
    readers = view.readers.get(tensor, [])
    others = any(node.name not in group_of for node in readers)
    return tensor in view.outputs or others or not readers


def _is_inside(view: GraphView, group_of: Mapping[str, int], group: int, tensor: str) -> bool:
    """Whether an operator of the group makes a tensor."""
    writer = view.writer.get(tensor)
    return writer is not None and group_of.get(writer.name) == group


def _needed(
    view: GraphView, plan: BandPlan, nodes: Sequence[onnx.NodeProto], band: int
) -> dict[tuple[int, str], Rows]:
    """The rows of each tensor that a band of each group has to have."""
    needed: dict[tuple[int, str], Rows] = {}
    for node in reversed(nodes):
        [tensor] = [name for name in node.output if name]
        group, window = plan.group_of[node.name], plan.windows[node.name]
        readers = view.readers.get(tensor, [])
        if tensor in plan.joined or any(plan.group_of[r.name] != group for r in readers):
            rows = owned_rows(height_of(view, tensor), plan.count, band)
            needed[group, tensor] = hull([rows, needed.get((group, tensor), rows)])
        for source in image_inputs(view, node):
            rows = window.reads(needed[group, tensor], height_of(view, source))
            needed[group, source] = hull([rows, needed.get((group, source), rows)])
    return needed


@dataclass(frozen=True)
class _Part:
    """A tensor that holds some rows of an image."""

    tensor: str
    rows: Rows


@dataclass(frozen=True)
class _Cutting:
    """What a draft gets in place of the operators in groups."""

    draft: Draft
    plan: BandPlan
    made: dict[tuple[str, int], _Part] = field(default_factory=dict)
    """By tensor and band."""
    held: dict[tuple[int, str, int], _Part] = field(default_factory=dict)
    """Of tensors from outside a group, by group, tensor and band."""
    pieces: dict[tuple[_Part, int], str] = field(default_factory=dict)
    """What was cut out of other tensors, and for which band: each cuts its own."""
    numbers: dict[int, str] = field(default_factory=dict)
    """Weights that say where to cut."""

    @property
    def view(self) -> GraphView:
        """The model as it was."""
        return self.draft.view

    def cut(self, node: onnx.NodeProto) -> None:
        """Replace an operator by one for each band."""
        added = self.draft.added.setdefault(node.name, [])
        self.draft.removed.add(node.name)
        [output] = [name for name in node.output if name]
        for band in range(self.plan.count):
            added.append(self._copy(node, band, added))
        if output in self.plan.joined:
            own = [self._owned(output, band, added) for band in range(self.plan.count)]
            added.append(_concat(own, output, f"{output}/joined"))

    def _copy(
        self, node: onnx.NodeProto, band: int, added: list[onnx.NodeProto]
    ) -> onnx.NodeProto:
        """The operator for one band."""
        view, window = self.view, self.plan.windows[node.name]
        sources = {t: self._source(node, t, band, added) for t in image_inputs(view, node)}
        height = height_of(view, next(iter(sources)))
        rows = window.entered(common([part.rows for part in sources.values()]), height)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.name}/band{band}"
        copy.input[:] = [
            self._trimmed(sources[t], rows, band, added) if t in sources else t for t in node.input
        ]
        if window != RowWindow():
            fit(self.draft, node, copy, window.pads(rows, height))
        [output] = [name for name in node.output if name]
        part = self._declared(output, f"{output}/band{band}", self.plan.made[output][band])
        self.made[output, band] = part
        copy.output[:] = [part.tensor]
        return copy

    def _source(
        self, node: onnx.NodeProto, tensor: str, band: int, added: list[onnx.NodeProto]
    ) -> _Part:
        """What a band has of a tensor that a node reads; cut or gathered at the first reader."""
        group = self.plan.group_of[node.name]
        rows = self.plan.held.get((group, tensor))
        if rows is None:
            return self.made[tensor, band]
        key = (group, tensor, band)
        if key not in self.held:
            self.held[key] = self._fetched(tensor, rows[band], band, added)
        return self.held[key]

    def _fetched(self, tensor: str, rows: Rows, band: int, added: list[onnx.NodeProto]) -> _Part:
        """Rows of a tensor from outside the group, for one band."""
        own = self.made.get((tensor, band))
        if own is None:
            whole = _Part(tensor, Rows(0, height_of(self.view, tensor)))
            return _Part(self._trimmed(whole, rows, band, added), rows)
        if own.rows == rows:
            return own
        parts = []
        for other in range(self.plan.count):
            mine = owned_rows(height_of(self.view, tensor), self.plan.count, other)
            for lent in (
                common([mine, Rows(rows.start, own.rows.start)]),
                common([mine, Rows(own.rows.stop, rows.stop)]),
            ):
                if lent.count > 0:
                    source = self._trimmed(self.made[tensor, other], lent, other, added)
                    parts.append(_Part(source, lent))
        parts = sorted([*parts, own], key=lambda part: part.rows.start)
        whole = self._declared(tensor, f"{tensor}/band{band}/haloed", rows)
        added.append(_concat([part.tensor for part in parts], whole.tensor, whole.tensor))
        return whole

    def _owned(self, tensor: str, band: int, added: list[onnx.NodeProto]) -> str:
        rows = owned_rows(height_of(self.view, tensor), self.plan.count, band)
        return self._trimmed(self.made[tensor, band], rows, band, added)

    def _trimmed(self, part: _Part, rows: Rows, band: int, added: list[onnx.NodeProto]) -> str:
        """A tensor with just these rows of a part, cut out for a band where it has more."""
        if part.rows == rows:
            return part.tensor
        piece = (_Part(part.tensor, rows), band)
        if piece not in self.pieces:
            is_new = part.tensor in self.draft.tensors
            stem = part.tensor if is_new else f"{part.tensor}/band{band}"
            name = f"{stem}/rows{rows.start}-{rows.stop}"
            self.pieces[piece] = self._declared(part.tensor, name, rows).tensor
            inside = rows.shifted(-part.rows.start)
            bounds = [self._number(n) for n in (inside.start, inside.stop, HEIGHT_AXIS)]
            added.append(
                helper.make_node("Slice", [part.tensor, *bounds], [self.pieces[piece]], name)
            )
        return self.pieces[piece]

    def _number(self, value: int) -> str:
        """A stored integer."""
        if value not in self.numbers:
            self.numbers[value] = self.draft.store(f"bands/{value}", np.array([value], np.int64))
        return self.numbers[value]

    def _declared(self, like: str, name: str, rows: Rows) -> _Part:
        """A new tensor with some rows of an image."""
        types = self.draft.tensors if like in self.draft.tensors else self.view.model.tensors
        kind = with_size(types[like], HEIGHT_AXIS, rows.count)
        return _Part(self.draft.declare(name, kind), rows)


def _concat(parts: Iterable[str], output: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Concat", list(parts), [output], name, axis=HEIGHT_AXIS)
