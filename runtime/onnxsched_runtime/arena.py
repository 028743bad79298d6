"""Where boundary tensors lie: one block of memory, shared by what never lives together. Pure.

Streams run at the same time, so positions in the launch order do not tell when a tensor is dead.
Two tensors share bytes only if every use of one happens before the other is written, by the
happens-before relation that `check_plan` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnxsched_runtime.clocks import Clock, Clocks
from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.plan import ExecutionPlan, Record, Run, Step, Wait

ALIGNMENT_NBYTES = 256
"""What `cudaMalloc` guarantees, and kernels with wide loads count on."""


Touched = Mapping[str, Collection[int]]
"""For a tensor the segments that read or write its place under another name, in a view's place."""


@dataclass(frozen=True)
class Arena:
    """The place of every boundary tensor in one block of memory."""

    nbytes: int
    offsets: Mapping[str, int]
    """Bytes from the start of the block, by tensor."""


@dataclass(frozen=True)
class Lifetime:
    """When a tensor is in use, in vector clocks."""

    nbytes: int
    born: Mapping[Placement, int]
    """What is finished before it is first written."""
    last_uses: Mapping[Placement, int]
    """For each stream the last step that reads or writes it."""
    is_kept: bool
    """A model input or output: the caller may look at it between any two runs."""

    def is_over_before(self, other: Lifetime) -> bool:
        """Whether every use happens before the other tensor is written."""
        return not self.is_kept and all(
            other.born.get(stream, 0) >= tick for stream, tick in self.last_uses.items()
        )

    def may_share(self, other: Lifetime) -> bool:
        """Whether the two never live together."""
        return self.is_over_before(other) or other.is_over_before(self)


def plan_arena(
    plan: ExecutionPlan, nbytes: Mapping[str, int], touched: Touched | None = None
) -> Arena:
    """Give tensors of a plan places.

    Greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net
    inference", 2020): the largest tensor first, each at the lowest offset where it meets no
    tensor that it may live together with. O(tensors^2 x streams).

    Args:
        plan: A plan that passes `check_plan`.
        nbytes: Size of each of its tensors that needs a place.
        touched: What also reads and writes these places.
    """
    lives = lifetimes(plan, nbytes, touched)
    order = sorted(lives, key=lambda name: (-lives[name].nbytes, name))
    offsets: dict[str, int] = {}
    for name in order:
        life = lives[name]
        taken = sorted(
            (offsets[other], offsets[other] + _aligned(lives[other].nbytes))
            for other in offsets
            if not life.may_share(lives[other])
        )
        offsets[name] = _first_gap(taken, _aligned(life.nbytes))
    ends = [offsets[name] + _aligned(life.nbytes) for name, life in lives.items()]
    return Arena(max(ends, default=0), offsets)


def packed(nbytes: Mapping[str, int]) -> Arena:
    """Places one after another, for what is never dead. O(n log n)."""
    offsets, end = {}, 0
    for name in sorted(nbytes):
        offsets[name] = end
        end += _aligned(nbytes[name])
    return Arena(end, offsets)


def check_arena(
    plan: ExecutionPlan,
    nbytes: Mapping[str, int],
    arena: Arena,
    touched: Touched | None = None,
) -> None:
    """Check that no two tensors that may live together share bytes.

    Raises:
        PlanError: names two tensors that do, or one that is misplaced.
    """
    lives = lifetimes(plan, nbytes, touched)
    for name in lives:
        if name not in arena.offsets:
            raise PlanError(f"Tensor '{name}' has no place in memory.")
        offset = arena.offsets[name]
        if offset < 0 or offset % ALIGNMENT_NBYTES or offset + nbytes[name] > arena.nbytes:
            raise PlanError(f"Tensor '{name}' lies at {offset} of {arena.nbytes} bytes.")
    placed = sorted(lives, key=lambda name: (arena.offsets[name], name))
    for position, name in enumerate(placed):
        end = arena.offsets[name] + nbytes[name]
        for other in placed[position + 1 :]:
            if arena.offsets[other] >= end:
                break
            if nbytes[other] and not lives[name].may_share(lives[other]):
                raise PlanError(f"Tensors '{name}' and '{other}' share memory while both live.")


def lifetimes(
    plan: ExecutionPlan, nbytes: Mapping[str, int], touched: Touched | None = None
) -> dict[str, Lifetime]:
    """When each of these tensors of a plan is in use. O((steps + uses) x streams)."""
    others: dict[int, list[str]] = {}
    for name, indices in (touched or {}).items():
        for index in indices:
            others.setdefault(index, []).append(name)
    kept = {*plan.inputs, *plan.outputs}
    born: dict[str, Clock] = {}
    uses: dict[str, Clock] = {}
    for placement, tick, start, step in _work(plan):
        beside = others.get(step.segment, []) if isinstance(step, Run) else []
        for name in (*plan.reads(step), *plan.writes(step), *beside):
            if name in nbytes:
                last = uses.setdefault(name, {})
                last[placement] = max(last.get(placement, 0), tick)
        for name in (*plan.writes(step), *beside):
            born.setdefault(name, start)
    return {
        name: Lifetime(nbytes[name], born.get(name, {}), uses.get(name, {}), name in kept)
        for name in sorted(nbytes)
    }


def _work(plan: ExecutionPlan) -> list[tuple[Placement, int, Clock, Step]]:
    """Each step that reads or writes: its stream, its number there, what is finished before."""
    done: Clock = {}
    work: list[tuple[Placement, int, Clock, Step]] = []
    for piece in plan.pieces:  # which starts when the one before it is finished
        clocks = Clocks(common=done)
        for step in piece.steps:
            placement = plan.placement_of(step)
            if isinstance(step, Record):
                clocks.record(step.event, placement)
            elif isinstance(step, Wait):
                clocks.wait(step.event, placement)
            else:
                known = dict(clocks.of(placement))
                work.append((placement, clocks.run(placement), known, step))
        done |= {
            stream: clock[stream] for stream, clock in clocks.streams.items() if stream in clock
        }
    return work


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def _first_gap(taken: Sequence[tuple[int, int]], nbytes: int) -> int:
    """The lowest offset where `nbytes` lie beside all that is taken; `taken` is sorted."""
    offset = 0
    for start, end in taken:
        if offset + nbytes <= start:
            break
        offset = max(offset, end)
    return offset
