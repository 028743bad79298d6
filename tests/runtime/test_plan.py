"""`check_plan` finds every damage and says where it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.partition import assemble, readers_of, segment_of
from onnxsched_runtime.plan import ExecutionPlan, Piece, Record, Run, Wait, check_plan
from support.plans import (
    Problem,
    damaged,
    is_right,
    operation,
    positions,
    problems,
    stream,
    with_step_moved,
    with_steps,
)


@settings(deadline=None, max_examples=400)
@given(data=st.data(), problem=problems())
def test_its_verdict_is_that_of_brute_force(data: DataObject, problem: Problem) -> None:
    plan = data.draw(damaged(problem.plan()))
    if is_right(plan):
        check_plan(plan, problem.operations)
    else:
        with pytest.raises(PlanError):
            check_plan(plan, problem.operations)


@settings(deadline=None)
@given(problem=problems())
def test_a_wait_after_the_run_comes_too_late(problem: Problem) -> None:
    plan = problem.plan()
    for number, position in positions(plan, Wait):
        steps = plan.pieces[number].steps
        placement = plan.placement_of(steps[position])
        runs = [
            later
            for later, step in enumerate(steps)
            if later > position and isinstance(step, Run)
            if plan.placement_of(step) == placement
        ]
        if runs:
            with pytest.raises(PlanError):
                check_plan(with_step_moved(plan, number, position, runs[0]), problem.operations)


@settings(deadline=None)
@given(problem=problems())
def test_a_run_before_its_producer_comes_too_early(problem: Problem) -> None:
    plan = problem.plan()
    runs = positions(plan, Run)
    for number, position in runs:
        segment = plan.segments[_run_at(plan, number, position)]
        for _, earlier in (at for at in runs if at[0] == number and at[1] < position):
            producer = plan.segments[_run_at(plan, number, earlier)]
            if set(producer.outputs) & set(segment.inputs):
                moved = with_step_moved(plan, number, position, earlier)
                with pytest.raises(PlanError):
                    check_plan(moved, problem.operations)


@settings(deadline=None)
@given(problem=problems())
def test_a_segment_that_is_called_fused_and_is_not_is_refused_and_the_reverse(
    problem: Problem,
) -> None:
    plan = problem.plan()
    for index, segment in enumerate(plan.segments):
        segments = list(plan.segments)
        segments[index] = replace(segment, is_fused=not segment.is_fused)
        message = f"'{segment.nodes[0]}' is in a segment of another kind"
        with pytest.raises(PlanError, match=message):
            check_plan(replace(plan, segments=tuple(segments)), problem.operations)


@pytest.mark.parametrize("fused", [*product((False, True), repeat=2)])
def test_operations_share_a_segment_only_if_none_is_fused(fused: tuple[bool, bool]) -> None:
    operations = [
        operation("a", 0, "x", fused=fused[0]),
        operation("b", 0, "a", fused=fused[1]),
    ]
    joined = segment_of(operations, readers_of(operations, ["b"]))
    plan = assemble([joined], ["x"], ["b"])
    if not any(fused):
        check_plan(plan, operations)
        return
    with pytest.raises(PlanError, match=r"'[ab]' is in a segment of another kind"):
        check_plan(plan, operations)


def _run_at(plan: ExecutionPlan, number: int, position: int) -> int:
    step = plan.pieces[number].steps[position]
    assert isinstance(step, Run)
    return step.segment


@settings(deadline=None)
@given(problem=problems())
def test_a_segment_less_or_twice_is_refused(problem: Problem) -> None:
    plan = problem.plan()
    for index, segment in enumerate(plan.segments):
        name = segment.nodes[0]
        for segments in (
            plan.segments[:index] + plan.segments[index + 1 :],
            (*plan.segments, segment),
        ):
            with pytest.raises(PlanError, match=r"'o\d+' is not in exactly one segment"):
                check_plan(replace(plan, segments=segments), problem.operations)
        without = tuple(o for o in problem.operations if o.name != name)
        with pytest.raises(PlanError, match=f"'{name}' is not in exactly one segment"):
            check_plan(plan, without)


@settings(deadline=None)
@given(problem=problems())
def test_a_run_less_or_twice_is_refused_by_number(problem: Problem) -> None:
    plan = problem.plan()
    for number, position in positions(plan, Run):
        steps = plan.pieces[number].steps
        index = _run_at(plan, number, position)
        for changed in (
            steps[:position] + steps[position + 1 :],
            (*steps, steps[position]),
        ):
            with pytest.raises(PlanError, match=f"Segment number {index} is not run exactly"):
                check_plan(with_steps(plan, number, changed), problem.operations)


PROBLEM = Problem(
    (
        operation("a", 0, "x"),
        operation("b", 1, "a"),
        operation("c", 0, "a b"),
        operation("h", 0, "c", host="a loop"),
        operation("d", 1, "h"),
    ),
    ("d",),
)
PLAN = PROBLEM.plan()
FIRST = PLAN.pieces[0].steps
UNJOINED = Piece(True, stream(0), (Record(0, stream(0)), Wait(0, stream(1)), Run(4)))


def test_the_plan_damaged_below_is_right_before() -> None:
    assert PLAN.pieces[0].steps == (
        Run(0),
        Record(0, stream(0)),
        Wait(0, stream(1)),
        Run(1),
        Record(1, stream(1)),
        Wait(1, stream(0)),
        Run(2),
    )
    check_plan(PLAN, PROBLEM.operations)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (with_steps(PLAN, 0, FIRST[:5] + FIRST[6:]), r"\('c',\) may read 'b' too early"),
        (with_steps(PLAN, 0, FIRST[:2] + FIRST[3:]), r"\('b',\) may run before piece 0 starts"),
        (with_steps(PLAN, 0, (*FIRST, FIRST[1])), "Event 0 is recorded twice"),
        (with_steps(PLAN, 0, FIRST[:4] + FIRST[5:]), "Event 1 is waited for before"),
        (
            replace(PLAN, pieces=(*PLAN.pieces[:2], UNJOINED)),
            "Piece 2 may end before stream cuda:0/1 does",
        ),
        (
            replace(PLAN, pieces=(PLAN.pieces[1], PLAN.pieces[0], PLAN.pieces[2])),
            r"\('h',\) reads 'c' before it is written",
        ),
        (
            replace(PLAN, pieces=(*PLAN.pieces[:1], replace(PLAN.pieces[1], captured=True))),
            "Segment number 4 is not run",
        ),
        (
            replace(
                PLAN,
                pieces=(PLAN.pieces[0], replace(PLAN.pieces[1], captured=True), PLAN.pieces[2]),
            ),
            r"\('h',\) in captured piece 1 can't be",
        ),
        (replace(PLAN, outputs=("d", "z")), "output 'z' is written by no segment"),
        (replace(PLAN, inputs=("a", "x")), "Tensor 'a' is written twice"),
        (replace(PLAN, inputs=()), r"\('a',\) may read 'x' too early"),
        (with_steps(PLAN, 1, (Run(3), Run(9))), "Segment number 9 is not run exactly once"),
    ],
)
def test_a_refusal_names_the_culprit(plan: ExecutionPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(plan, PROBLEM.operations)


def test_a_segment_must_see_what_its_operations_read_and_be_on_their_stream() -> None:
    blind = (replace(PLAN.segments[0], inputs=()), *PLAN.segments[1:])
    with pytest.raises(PlanError, match="'a' can't see tensor 'x'"):
        check_plan(replace(PLAN, segments=blind), PROBLEM.operations)
    elsewhere = (replace(PLAN.segments[0], placement=stream(5)), *PLAN.segments[1:])
    with pytest.raises(PlanError, match="'a' runs on cuda:0/5"):
        check_plan(replace(PLAN, segments=elsewhere), PROBLEM.operations)


def test_a_piece_knows_its_runs() -> None:
    assert PLAN.pieces[0].runs == (0, 1, 2)
    assert PLAN.wait_count == 2


def test_only_what_captured_pieces_touch_needs_a_fixed_address() -> None:
    operations = (
        operation("a", 0, "x", host="a loop"),
        operation("b", 0, "a", host="a loop"),
        operation("c", 0, "b"),
    )
    assert Problem(operations, ("c",)).plan().device_tensors == {"b", "c"}
