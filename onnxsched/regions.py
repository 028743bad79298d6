"""Where cutting images into bands may pay: which operators, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx

from onnxsched.bands import BandPlan, plan_bands
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.rows import Rows, height_of, image_inputs, owned_rows, row_window
from onnxsched.seeding import band_of
from onnxsched_runtime.model import attributes_of

_OVERHEAD_BOUND = 0.1
"""The largest share of work done twice for which a group is made longer."""
_LEAST_ROWS = 8
"""Of a band: with fewer, halos are most of it."""
_LEAST_OPSET = 10
"""From here on a Slice takes its bounds as inputs, before as attributes."""
_MAX_WIDTH = 4
"""Tensors that may flow from one group to the next."""

Nodes = Sequence[onnx.NodeProto]


@dataclass(frozen=True, slots=True)
class BandRegion:
    """Operators to be cut into bands, and what that costs."""

    groups: tuple[tuple[str, ...], ...]
    """Names of nodes: halos are computed again within a group, exchanged between groups."""
    count: int
    """Bands."""
    operation_count: int
    """Of the operators as they are."""
    extra_operation_count: int
    """What bands together do beyond that."""
    read_nbytes: int
    """What bands other than the first read of tensors from outside."""
    exchanged_nbytes: int
    """What bands read of each other's tensors."""
    joined_nbytes: int
    """What bands other than the first give to operators outside, and to the caller."""

    @property
    def overhead(self) -> float:
        """Operations done beyond those of the whole image, as a share of those."""
        return self.extra_operation_count / self.operation_count


def find_bands(model: Model, count: int) -> dict[str, BandRegion]:
    """Regions that may be cut into bands, by the name of the scheme that finds them.

    `bands` takes all operators over large images, in groups as long as little work is done twice.
    `bands-prefix` takes the first of these groups only, where images are largest: nothing is
    exchanged, and all is joined once. `bands-half` takes the first half of them: a small image
    hardly fills one device, so that half of it takes as long. Left out is what would be the same
    again, and a model that is in bands is not cut once more. O(nodes * count * log(nodes)) where
    groups are short.

    Args:
        model: A portable model.
        count: Bands, at least 2.
    """
    view = GraphView(model)
    is_cut = any(band_of(node.name) is not None for node in model.proto.graph.node)
    nodes = [node for node in model.proto.graph.node if _is_large(view, node, count)]
    if view.opset < _LEAST_OPSET or is_cut or not nodes:
        return {}
    groups = _grouped(view, list(_pieces(view, nodes, count, 1)), count)
    found = {"bands": region_of(view, groups, count)}
    if len(groups) > 2:
        found["bands-half"] = region_of(view, groups[: (len(groups) + 1) // 2], count)
    if len(groups) > 1:
        found["bands-prefix"] = region_of(view, groups[:1], count)
    return found


def region_of(view: GraphView, groups: Sequence[Sequence[str]], count: int) -> BandRegion:
    """What cutting groups of operators into bands costs; see `plan_bands` for what that takes.

    Raises:
        ValueError: An operator can't be cut, or an image has too few rows.
    """
    plan = plan_bands(view, groups, count)
    nodes = view.in_order(plan.group_of)
    work = [(_row_operations(view, node), height_of(view, node.output[0])) for node in nodes]
    made = [sum(rows.count for rows in plan.made[node.output[0]]) for node in nodes]
    outside = [(t, rows) for (_, t), rows in plan.held.items() if t not in plan.made]
    return BandRegion(
        groups=tuple(map(tuple, groups)),
        count=count,
        operation_count=sum(each * height for each, height in work),
        extra_operation_count=sum(
            each * (rows - height) for (each, height), rows in zip(work, made, strict=True)
        ),
        read_nbytes=sum(_nbytes(view, t, own) for t, rows in outside for own in rows[1:]),
        exchanged_nbytes=_exchanged_nbytes(view, plan),
        joined_nbytes=sum(
            _nbytes(view, t, owned_rows(height_of(view, t), count, band))
            for t in plan.joined
            for band in range(1, count)
        ),
    )


def _is_large(view: GraphView, node: onnx.NodeProto, count: int) -> bool:
    """Whether a node can be cut, and its bands have enough rows."""
    if row_window(view, node) is None:
        return False
    return height_of(view, node.output[0]) >= count * _LEAST_ROWS


def _exchanged_nbytes(view: GraphView, plan: BandPlan) -> int:
    return sum(
        _nbytes(view, tensor, held) - _nbytes(view, tensor, made)
        for (_, tensor), rows in plan.held.items()
        if tensor in plan.made
        for held, made in zip(rows, plan.made[tensor], strict=True)
    )


def _nbytes(view: GraphView, tensor: str, rows: Rows) -> int:
    return view.model.tensors[tensor].nbytes // height_of(view, tensor) * rows.count


def _row_operations(view: GraphView, node: onnx.NodeProto) -> int:
    """How many operations one row of a node's result takes, a product and a sum being two."""
    batch, channels, _, width = view.model.tensors[node.output[0]].shape or ()
    weights = [view.weights[name].dims for name in node.input[1:2] if name in view.weights]
    each = 1
    if node.op_type.endswith("Conv"):
        each = 2 * math.prod(weights[0][1:])
    elif node.op_type.endswith("Pool"):
        each = math.prod(attributes_of(node)["kernel_shape"])
    return batch * channels * width * each


def _grouped(view: GraphView, pieces: Sequence[Nodes], count: int) -> list[tuple[str, ...]]:
    """Neighbouring pieces joined into groups, each as long as it does little twice."""
    groups: list[tuple[str, ...]] = []
    first = 0
    while first < len(pieces):
        length = 1
        while first + length < len(pieces) and _is_thrifty(
            view, pieces[first : first + 2 * length], count
        ):
            length *= 2
        step = length
        while step := step // 2:
            if _is_thrifty(view, pieces[first : first + length + step], count):
                length += step
        chosen = pieces[first : first + length]
        groups.append(tuple(node.name for piece in chosen for node in piece))
        first += length
    return groups


def _is_thrifty(view: GraphView, pieces: Sequence[Nodes], count: int) -> bool:
    """Whether pieces can be one group in which little is done twice."""
    names = [node.name for piece in pieces for node in piece]
    return region_of(view, [names], count).overhead <= _OVERHEAD_BOUND


def _pieces(view: GraphView, nodes: Nodes, count: int, width: int) -> Iterator[Nodes]:
    """Nodes cut where few tensors flow on: one where that is enough, else more."""
    for piece in _cut(view, nodes, width):
        if width == _MAX_WIDTH or _is_thrifty(view, [piece], count):
            yield piece
        else:
            yield from _pieces(view, piece, count, width + 1)


def _cut(view: GraphView, nodes: Nodes, width: int) -> Iterator[Nodes]:
    """Nodes cut wherever at most `width` tensors are read on both sides, or made and read."""
    last_reader = {t: node.name for node in nodes for t in image_inputs(view, node)}
    alive: set[str] = set()
    piece: list[onnx.NodeProto] = []
    for node in nodes:
        piece.append(node)
        inputs = image_inputs(view, node)
        alive.update(t for t in (*inputs, *node.output) if t in last_reader)
        alive.difference_update(t for t in inputs if last_reader[t] == node.name)
        if len(alive) <= width:
            yield piece
            piece = []
    if piece:
        yield piece
