"""Boundary tensors share memory only where no run can tell, in any interleaving of the streams."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn

from onnxsched_runtime.arena import (
    ALIGNMENT_NBYTES,
    Arena,
    _Sharing,
    check_arena,
    lifetimes,
    plan_arena,
)
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.partition import assemble, readers_of, segment_of
from onnxsched_runtime.plan import ExecutionPlan
from support.plans import Problem, happens_before, interleaved, operation, problems

Sizes = Mapping[str, int]


def one_each(problem: Problem) -> ExecutionPlan:
    """A plan with a segment for every operation, so that a stream has many runs."""
    readers = readers_of(problem.operations, problem.outputs)
    segments = [segment_of([o], readers) for o in problem.operations]
    return assemble(segments, problem.inputs, problem.outputs)


@st.composite
def sized_plans(draw: DrawFn) -> tuple[ExecutionPlan, Sizes]:
    """A plan of many or few segments, and a size for each device tensor."""
    problem = draw(problems(max_operations=14, streams=3))
    plan = one_each(problem) if draw(st.booleans()) else problem.plan()
    sizes = st.sampled_from([0, 1, 200, 256, 300, 1000])
    return plan, {name: draw(sizes) for name in sorted(plan.device_tensors)}


def aligned(nbytes: int) -> int:
    return (nbytes + ALIGNMENT_NBYTES - 1) // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES


class Memory:
    """Bytes that know which tensor was last written to them."""

    def __init__(self, plan: ExecutionPlan, nbytes: Sizes, arena: Arena) -> None:
        self._plan, self._nbytes, self._arena = plan, nbytes, arena
        self._number = {name: number for number, name in enumerate(sorted(nbytes), start=1)}
        self._tags = np.zeros(arena.nbytes, np.int32)

    def write(self, name: str) -> None:
        self._at(name)[:] = self._number.get(name, 0)

    def require(self, name: str) -> None:
        assert (self._at(name) == self._number.get(name, 0)).all(), f"{name} is overwritten"

    def _at(self, name: str) -> np.ndarray:
        offset = self._arena.offsets.get(name, 0)
        return self._tags[offset : offset + self._nbytes.get(name, 0)]

    def begin(self, index: int) -> None:
        """The earliest write of a run."""
        for name in self._plan.segments[index].outputs:
            self.write(name)

    def end(self, index: int) -> None:
        """Its latest read."""
        segment = self._plan.segments[index]
        for name in (*segment.inputs, *segment.outputs):
            self.require(name)


def execute(plan: ExecutionPlan, nbytes: Sizes, arena: Arena, seed: int) -> None:
    """Run a plan: streams are queues that go on at random, and runs take time."""
    memory, generator = Memory(plan, nbytes, arena), random.Random(seed)
    for name in plan.inputs:
        memory.write(name)
    for begins, index in interleaved(plan, generator):
        (memory.begin if begins else memory.end)(index)
    for name in (*plan.inputs, *plan.outputs):
        memory.require(name)


@settings(deadline=None, max_examples=300)
@given(sized=sized_plans(), seed=st.integers(0, 2**32))
def test_no_run_reads_what_another_tensor_has_overwritten(
    sized: tuple[ExecutionPlan, Sizes], seed: int
) -> None:
    plan, nbytes = sized
    arena = plan_arena(plan, nbytes)
    for number in range(5):
        execute(plan, nbytes, arena, seed + number)


@settings(deadline=None)
@given(sized=sized_plans())
def test_it_passes_the_check_and_is_between_the_largest_tensor_and_all_of_them(
    sized: tuple[ExecutionPlan, Sizes],
) -> None:
    plan, nbytes = sized
    arena = plan_arena(plan, nbytes)
    check_arena(plan, nbytes, arena)
    assert arena.offsets.keys() == plan.device_tensors
    assert max(nbytes.values(), default=0) <= arena.nbytes
    assert arena.nbytes <= sum(map(aligned, nbytes.values()))


@settings(deadline=None)
@given(sized=sized_plans())
def test_an_input_shares_with_nobody(sized: tuple[ExecutionPlan, Sizes]) -> None:
    plan, nbytes = sized
    offsets = plan_arena(plan, nbytes).offsets
    for name in set(plan.inputs) & offsets.keys():
        for other in offsets.keys() - {name}:
            first, second = sorted((name, other), key=lambda n: (offsets[n], nbytes[n]))
            assert offsets[first] + nbytes[first] <= offsets[second] or not nbytes[second]


def may_share(plan: ExecutionPlan, order: set[tuple[object, object]], a: str, b: str) -> bool:
    """Whether all that touches one tensor happens before the other is written: brute force."""
    kept = {*plan.inputs, *plan.outputs}

    def is_over_before(one: str, other: str) -> bool:
        users = [
            index
            for index, segment in enumerate(plan.segments)
            if one in segment.inputs or one in segment.outputs
        ]
        writers = [i for i, segment in enumerate(plan.segments) if other in segment.outputs]
        return (
            one not in kept
            and bool(writers)
            and all((user, writer) in order for user in users for writer in writers)
        )

    return is_over_before(a, b) or is_over_before(b, a)


@settings(deadline=None)
@given(data=st.data(), sized=sized_plans())
def test_the_verdict_on_an_overlap_is_that_of_brute_force(
    data: DataObject, sized: tuple[ExecutionPlan, Sizes]
) -> None:
    plan, nbytes = sized
    order = happens_before(plan)
    offsets: dict[str, int] = {}
    for name in data.draw(st.permutations(sorted(nbytes))):
        offsets[name] = sum(aligned(nbytes[other]) for other in offsets)
    end = sum(map(aligned, nbytes.values()))
    check_arena(plan, nbytes, Arena(end, offsets))
    for a, b in combinations(sorted(n for n in nbytes if nbytes[n]), 2):
        first, second = (a, b) if nbytes[a] >= nbytes[b] else (b, a)
        last = offsets[first] + aligned(nbytes[first]) - aligned(nbytes[second])
        for inside in range(offsets[first], last + 1, ALIGNMENT_NBYTES):
            forced = Arena(end, {**offsets, second: inside})
            if may_share(plan, order, a, b):
                check_arena(plan, nbytes, forced)
                continue
            with pytest.raises(PlanError, match="share memory while both live") as caught:
                check_arena(plan, nbytes, forced)
            assert f"'{a}'" in str(caught.value)
            assert f"'{b}'" in str(caught.value)


def chain(length: int, streams: int = 1) -> Problem:
    """Operations one after another, on one stream or in turn on several."""
    operations = [operation("t0", 0, "x")]
    operations += [operation(f"t{n}", n % streams, f"t{n - 1}") for n in range(1, length)]
    return Problem(tuple(operations), (f"t{length - 1}",))


@pytest.mark.parametrize("streams", [1, 3])
def test_a_long_chain_needs_its_input_and_two_tensors(streams: int) -> None:
    plan = one_each(chain(50, streams))
    nbytes = dict.fromkeys(plan.device_tensors, 1000)
    assert len(nbytes) == 51
    assert plan_arena(plan, nbytes).nbytes == 3 * 1024


def test_chains_side_by_side_do_not_share() -> None:
    operations = [
        operation(f"{lane}{n}", number, f"{lane}{n - 1}" if n else "x")
        for n in range(10)
        for number, lane in enumerate("ab")
    ]
    plan = one_each(Problem(tuple(operations), ("a9", "b9")))
    nbytes = dict.fromkeys(plan.device_tensors, 256)
    assert plan_arena(plan, nbytes).nbytes == 5 * 256
    offsets = plan_arena(plan, nbytes).offsets
    lanes = [{offsets[name] for name in offsets if name.startswith(lane)} for lane in "ab"]
    assert not lanes[0] & lanes[1]


def test_a_piece_starts_when_the_one_before_is_finished() -> None:
    operations = (
        operation("a", 0, "x"),
        operation("b", 1, "x"),
        operation("h", 0, "a b", host="a loop"),
        operation("c", 0, "h"),
        operation("d", 1, "h"),
        operation("y", 0, "c d"),
    )
    plan = Problem(operations, ("y",)).plan()
    arena = plan_arena(plan, dict.fromkeys(plan.device_tensors, 256))
    assert arena.nbytes == 4 * 256
    assert {arena.offsets["a"], arena.offsets["b"]} & {arena.offsets["c"], arena.offsets["d"]}


PLAN = one_each(chain(4))
NBYTES = dict.fromkeys(PLAN.device_tensors, 300)
ARENA = plan_arena(PLAN, NBYTES)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (None, "Tensor 't1' has no place in memory"),
        (-256, "Tensor 't1' lies at -256 of 1536 bytes"),
        (8, "Tensor 't1' lies at 8 of 1536 bytes"),
        (1280, "Tensor 't1' lies at 1280 of 1536 bytes"),
        (2048, "Tensor 't1' lies at 2048 of 1536 bytes"),
    ],
)
def test_a_misplaced_tensor_is_named(offset: int | None, message: str) -> None:
    check_arena(PLAN, NBYTES, ARENA)
    offsets = {name: at for name, at in ARENA.offsets.items() if name != "t1"}
    if offset is not None:
        offsets["t1"] = offset
    with pytest.raises(PlanError, match=message):
        check_arena(PLAN, NBYTES, replace(ARENA, offsets=offsets))


@settings(deadline=None)
@given(sized=sized_plans())
def test_all_that_may_share_with_one_tensor_are_found_at_once(
    sized: tuple[ExecutionPlan, Sizes],
) -> None:
    plan, nbytes = sized
    lives = list(lifetimes(plan, nbytes).values())
    sharing = _Sharing(lives)
    for number, life in enumerate(lives):
        assert sharing.with_one(number).tolist() == [life.may_share(other) for other in lives]
