"""Nodes that compute nothing, and what lies in the place of what: a piece in its whole. Pure.

A piece that is cut out of a tensor, and parts that are joined to one, need no copy where they are
neighbours in memory: they lie where the whole does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.plan import ExecutionPlan

FINEST_NBYTES = 16
"""Kernels load that much at once, so tensors begin at multiples of it."""


@dataclass(frozen=True, slots=True)
class Reordered:
    """The numbers of a tensor in another order."""

    source: str
    output: str
    shape: tuple[int, ...]
    """Of the result."""
    item_nbytes: int
    start: int
    """Which number of the source is the first."""
    strides: tuple[int, ...]
    """How many numbers of the source neighbours lie apart, along each axis of the result."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Neighbouring bytes of a tensor."""

    source: str
    output: str
    start_nbytes: int
    nbytes: int
    whole_nbytes: int
    """Of the source."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors one after another, as one."""

    parts: tuple[str, ...]
    """Each once; they lie nowhere but in the whole."""
    output: str
    starts_nbytes: tuple[int, ...]


Move = Reordered | Cut | Joined
"""What a node does that computes nothing."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in another that has a place of its own."""

    root: str
    start_nbytes: int


def places_inside(
    plan: ExecutionPlan, moves: Mapping[str, Move], ends: Collection[str]
) -> dict[str, Place]:
    """The tensors of a plan that lie in others: parts in their whole, pieces in what has them.

    A part that is a piece of another tensor lies in what it is a part of, where both are on one
    device, and is copied from where it is to another. O(segments x depth).

    Args:
        plan: The plan; what moves is a segment of its own.
        moves: All of the model, by the name of their nodes.
        ends: Inputs and outputs of the model, which have places of their own.
    """
    inside: dict[str, Place] = {}
    parts, left = _parts(moves), left_in_place(moves, ends)
    for segment in plan.segments:
        move = moves.get(segment.nodes[0])
        if isinstance(move, Joined):
            name = {plan.original(tensor): tensor for tensor in segment.inputs}
            for part, start in zip(move.parts, move.starts_nbytes, strict=True):
                inside[name[part]] = Place(segment.outputs[0], start)
    for segment in plan.segments:
        move = moves.get(segment.nodes[0])
        if isinstance(move, Cut) and (segment.nodes[0] in left or _can_stay(move, parts)):
            inside.setdefault(segment.outputs[0], Place(segment.inputs[0], move.start_nbytes))
    return {name: _rooted(place, inside) for name, place in inside.items()}


def _parts(moves: Mapping[str, Move]) -> frozenset[str]:
    return frozenset(t for move in moves.values() if isinstance(move, Joined) for t in move.parts)


def _can_stay(cut: Cut, among: Collection[str]) -> bool:
    """Whether a piece is one of these and begins where kernels may read."""
    return cut.output in among and not cut.start_nbytes % FINEST_NBYTES


def _rooted(place: Place, inside: Mapping[str, Place]) -> Place:
    while place.root in inside:
        outer = inside[place.root]
        place = Place(outer.root, place.start_nbytes + outer.start_nbytes)
    return place


def check_places(inside: Mapping[str, Place], nbytes: Mapping[str, int]) -> None:
    """Check that whatever lies in another tensor does so as a whole.

    Raises:
        PlanError: names one that does not.
    """
    for name, place in inside.items():
        end = place.start_nbytes + nbytes[name]
        if place.root in inside or place.start_nbytes < 0 or end > nbytes[place.root]:
            raise PlanError(f"Tensor '{name}' does not lie in '{place.root}'.")


def left_in_place(moves: Mapping[str, Move], ends: Collection[str]) -> frozenset[str]:
    """The nodes that need no kernel where what they read is on their device. O(nodes).

    A piece keeps all of what it lies in alive, which another may lie in as a piece. So it is
    copied where that is large beside all pieces of it, and not there for good anyway.

    Args:
        moves: All of a model, by the name of their nodes.
        ends: Its inputs and outputs.
    """
    alone = {move.output for move in moves.values()} - _parts(moves) - {*ends}
    cuts = {
        name: move
        for name, move in moves.items()
        if isinstance(move, Cut) and _can_stay(move, alone)
    }
    pieces = {cut.output: cut for cut in cuts.values()}
    used: dict[str, int] = {}
    for cut in cuts.values():
        used[cut.source] = used.get(cut.source, 0) + cut.nbytes

    def kept_nbytes(cut: Cut) -> int:
        while cut.source in pieces:
            cut = pieces[cut.source]
        return cut.whole_nbytes

    joined = {name for name, move in moves.items() if isinstance(move, Joined)}
    return frozenset(joined).union(
        name
        for name, cut in cuts.items()
        if cut.source in ends or 2 * used[cut.source] >= kept_nbytes(cut)
    )
