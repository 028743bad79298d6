"""Where boundary tensors lie: one block of memory, shared by what never lives together. Pure.

Streams run at the same time, so positions in the launch order do not tell when a tensor is dead.
Two tensors share bytes only if every use of one happens before the other is written, by the
happens-before relation that `check_plan` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxsched_runtime.clocks import Clock, Clocks
from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.moves import Place
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
    plan: ExecutionPlan,
    nbytes: Mapping[str, int],
    touched: Touched | None = None,
    inside: Mapping[str, Place] | None = None,
) -> Arena:
    """Give tensors of a plan places.

    Greedy by size (Pisarchyk and Lee, "Efficient memory management for deep neural net
    inference", 2020): the largest tensor first, each at the lowest offset where it meets no
    tensor that it may live together with. O(tensors x (uses + tensors log tensors)), in numpy; a
    use is a stream that a tensor is made or read on.

    Args:
        plan: A plan that passes `check_plan`.
        nbytes: Size of each of its tensors that needs a place.
        touched: What also reads and writes these places.
        inside: Other tensors, which lie in one of these.
    """
    lives = lifetimes(plan, nbytes, touched, inside)
    if all(life.is_kept for life in lives.values()):
        return packed(nbytes)
    order = sorted(lives, key=lambda name: (-lives[name].nbytes, name))
    sharing = _Sharing([lives[name] for name in order])
    starts, ends = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    for number, name in enumerate(order):
        beside = np.flatnonzero(~sharing.with_one(number)[:number])
        beside = beside[np.argsort(starts[beside], kind="stable")]
        size = _aligned(lives[name].nbytes)
        starts[number] = _first_gap(starts[beside], ends[beside], size)
        ends[number] = starts[number] + size
    offsets = dict(zip(order, starts.tolist(), strict=True))
    return Arena(int(ends.max(initial=0)), offsets)


class _Sharing:
    """Which of many tensors may share bytes, asked of one at a time: `Lifetime.may_share`."""

    def __init__(self, lives: Sequence[Lifetime]) -> None:
        self._lives = lives
        streams = {placement for life in lives for placement in life.last_uses}
        self._number = {placement: number for number, placement in enumerate(sorted(streams))}
        self._kept = np.array([life.is_kept for life in lives], bool)
        self._born = np.zeros((len(streams), len(lives)), np.int32)
        owners, used, ticks = [], [], []
        for index, life in enumerate(lives):
            for placement, tick in life.born.items():
                if placement in self._number:
                    self._born[self._number[placement], index] = tick
            for placement, tick in life.last_uses.items():
                owners.append(index)
                used.append(self._number[placement])
                ticks.append(tick)
        self._owners, self._used = np.array(owners, np.intp), np.array(used, np.intp)
        self._ticks = np.array(ticks, np.int32)

    def with_one(self, index: int) -> np.ndarray:
        """For each tensor whether it may share bytes with this one."""
        is_over = np.full(len(self._lives), not self._kept[index])
        for placement, tick in self._lives[index].last_uses.items():
            is_over &= self._born[self._number[placement]] >= tick
        late = self._born[self._used, index] < self._ticks
        are_over = ~self._kept
        are_over[self._owners[late]] = False
        found: np.ndarray = is_over | are_over
        return found


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
    inside: Mapping[str, Place] | None = None,
) -> None:
    """Check that no two tensors that may live together share bytes.

    Raises:
        PlanError: names two tensors that do, or one that is misplaced.
    """
    lives = lifetimes(plan, nbytes, touched, inside)
    for name in lives:
        if name not in arena.offsets:
            raise PlanError(f"Tensor '{name}' has no place in memory.")
        offset = arena.offsets[name]
        if offset < 0 or offset % ALIGNMENT_NBYTES or offset + nbytes[name] > arena.nbytes:
            raise PlanError(f"Tensor '{name}' lies at {offset} of {arena.nbytes} bytes.")
    placed = sorted(lives, key=lambda name: (arena.offsets[name], name))
    sharing = _Sharing([lives[name] for name in placed])
    starts = np.array([arena.offsets[name] for name in placed], np.int64)
    is_empty = np.array([not nbytes[name] for name in placed], bool)
    for position, name in enumerate(placed):
        last = int(np.searchsorted(starts, arena.offsets[name] + nbytes[name]))
        if last <= position + 1:
            continue
        beside = slice(position + 1, last)
        wrong = ~sharing.with_one(position)[beside] & ~is_empty[beside]
        if wrong.any():
            other = placed[position + 1 + int(wrong.argmax())]
            raise PlanError(f"Tensors '{name}' and '{other}' share memory while both live.")


def lifetimes(
    plan: ExecutionPlan,
    nbytes: Mapping[str, int],
    touched: Touched | None = None,
    inside: Mapping[str, Place] | None = None,
) -> dict[str, Lifetime]:
    """When each of these tensors of a plan is in use, or one that lies in it.

    O((steps + uses) x streams).
    """
    root = {name: place.root for name, place in (inside or {}).items()}
    others: dict[int, list[str]] = {}
    for name, indices in (touched or {}).items():
        for index in indices:
            others.setdefault(index, []).append(name)
    inputs = frozenset(plan.inputs)
    kept = inputs.union(plan.outputs)
    born: dict[str, Clock] = {}
    uses: dict[str, Clock] = {}
    for placement, tick, start, step in _work(plan):
        beside = others.get(step.segment, []) if isinstance(step, Run) else []
        written = {root.get(name, name) for name in (*plan.writes(step), *beside)}
        for name in written.union(root.get(name, name) for name in plan.reads(step)):
            if name in nbytes:
                last = uses.setdefault(name, {})
                last[placement] = max(last.get(placement, 0), tick)
        for name in written - inputs:  # which are there from the start
            born[name] = _before_both(born[name], start) if name in born else start
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


def _before_both(one: Clock, other: Clock) -> Clock:
    """What is finished before two steps, each of which may be the first."""
    return {stream: min(one[stream], other[stream]) for stream in one.keys() & other.keys()}


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def _first_gap(starts: np.ndarray, ends: np.ndarray, nbytes: int) -> int:
    """The lowest offset where `nbytes` lie beside all that is taken; `starts` are sorted."""
    reach = np.maximum.accumulate(np.concatenate(([0], ends)))
    fitting = np.flatnonzero(starts - reach[:-1] >= nbytes)
    return int(reach[fitting[0]] if fitting.size else reach[-1])
