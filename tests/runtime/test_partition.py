"""Annotated operations become few segments, ordered by no more waits than needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn

from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.partition import (
    assemble,
    capture_levels,
    plan_execution,
    readers_of,
    required_waits,
    segment_of,
    segments_of_run,
)
from onnxsched_runtime.plan import Operation, Record, Run, Step, Wait, check_plan
from support.plans import (
    Problem,
    closure,
    happens_before,
    is_right,
    operation,
    positions,
    problems,
    stream,
    topological_orders,
    without_step,
)
from support.timing import at_most_cpu_s

START, END = -1, "end"


@settings(deadline=None)
@given(problem=problems())
def test_a_plan_orders_all_that_it_must(problem: Problem) -> None:
    plan = problem.plan()
    check_plan(plan, problem.operations)
    assert is_right(plan)


@settings(deadline=None)
@given(problem=problems())
def test_no_event_is_redundant(problem: Problem) -> None:
    plan = problem.plan()
    for number, position in positions(plan, Wait) + positions(plan, Record):
        with pytest.raises(PlanError):
            check_plan(without_step(plan, number, position), problem.operations)


@settings(deadline=None)
@given(problem=problems())
def test_segments_hold_every_operation_once_and_are_of_one_stream(problem: Problem) -> None:
    plan = problem.plan()
    by_name = {o.name: o for o in problem.operations}
    held = [name for segment in plan.segments for name in segment.nodes]
    assert sorted(held) == sorted(by_name)
    for segment in plan.segments:
        operations = [by_name[name] for name in segment.nodes]
        assert operations == sorted(operations, key=problem.operations.index)
        assert segment.placement == operations[0].placement
        if segment.host_reason is None:
            assert {(o.placement, o.host_reason) for o in operations} == {
                (segment.placement, None)
            }
        else:
            reasons = dict.fromkeys(o.host_reason for o in operations)
            assert segment.host_reason == "; ".join(map(str, reasons))


@settings(deadline=None)
@given(problem=problems())
def test_segments_are_convex(problem: Problem) -> None:
    paths = closure(problem.links)
    for segment in problem.plan().segments:
        inside = set(segment.nodes)
        for outer in {o.name for o in problem.operations} - inside:
            assert not (
                any((name, outer) in paths for name in inside)
                and any((outer, name) in paths for name in inside)
            )


@settings(deadline=None)
@given(problem=problems())
def test_a_segment_hands_on_what_others_read_or_one_tensor_if_they_read_none(
    problem: Problem,
) -> None:
    writes = {o.name: set(o.writes) for o in problem.operations}
    for segment in problem.plan().segments:
        inside = set(segment.nodes)
        written = {t for name in inside for t in writes[name]}
        read_inside = {t for o in problem.operations if o.name in inside for t in o.reads}
        read_outside = {t for o in problem.operations if o.name not in inside for t in o.reads}
        assert sorted(segment.inputs) == sorted(read_inside - written)
        wanted = written & (read_outside | {*problem.outputs})
        assert set(segment.outputs) == wanted or (not wanted and len(segment.outputs) == 1)


@settings(deadline=None)
@given(problem=problems(hosts=False))
def test_segments_end_only_where_an_event_or_a_fused_operation_is(problem: Problem) -> None:
    plan = problem.plan()
    lanes: dict[Placement, list[Step]] = {}
    for step in plan.pieces[0].steps:
        lanes.setdefault(plan.placement_of(step), []).append(step)
    for lane in lanes.values():
        for a, b in pairwise(lane):
            if isinstance(a, Run) and isinstance(b, Run):
                assert any(plan.segments[step.segment].is_fused for step in (a, b))


@given(problem=problems(hosts=False, fuses=False, streams=1))
def test_one_stream_is_one_segment_without_events(problem: Problem) -> None:
    plan = problem.plan()
    assert [segment.nodes for segment in plan.segments] == [
        tuple(o.name for o in problem.operations)
    ]
    assert plan.pieces[0].steps == (Run(0),)
    assert plan.wait_count == 0


@given(problem=problems(hosts=False, streams=1))
def test_on_one_stream_segments_are_cut_around_fused_operations_only(problem: Problem) -> None:
    plan = problem.plan()
    assert plan.pieces[0].steps == tuple(map(Run, range(len(plan.segments))))
    readers = readers_of(problem.operations, problem.outputs)
    assert list(plan.segments) == segments_of_run(problem.operations, readers)
    held = [name for segment in plan.segments for name in segment.nodes]
    assert held == [o.name for o in problem.operations]
    assert all(a.is_fused or b.is_fused for a, b in pairwise(plan.segments))


@settings(deadline=None)
@given(problem=problems())
def test_a_fused_operation_is_alone_in_its_segment(problem: Problem) -> None:
    fused = {o.name for o in problem.operations if o.is_fused}
    for segment in problem.plan().segments:
        assert segment.is_fused == (not fused.isdisjoint(segment.nodes))
        assert not segment.is_fused or len(segment.nodes) == 1


def test_a_fork_and_join_worked_by_hand() -> None:
    operations = (
        operation("stem", 0, "x"),
        operation("left", 0, "stem"),
        operation("right", 1, "stem"),
        operation("more", 1, "right"),
        operation("join", 0, "left more"),
    )
    plan = plan_execution(operations, ["x"], ["join"])
    assert [s.nodes for s in plan.segments] == [
        ("stem",),
        ("left",),
        ("right", "more"),
        ("join",),
    ]
    assert [s.outputs for s in plan.segments] == [("stem",), ("left",), ("more",), ("join",)]
    assert plan.pieces[0].main == stream(0)
    assert plan.pieces[0].steps == (
        Run(0),
        Record(0, stream(0)),
        Run(1),
        Wait(0, stream(1)),
        Run(2),
        Record(1, stream(1)),
        Wait(1, stream(0)),
        Run(3),
    )


def test_independent_streams_fork_at_the_start_and_join_at_the_end() -> None:
    plan = plan_execution([operation("a", 1), operation("b", 4)], [], ["a", "b"])
    assert plan.pieces[0].main == stream(1)
    assert plan.pieces[0].steps == (
        Record(0, stream(1)),
        Run(0),
        Wait(0, stream(4)),
        Run(1),
        Record(1, stream(4)),
        Wait(1, stream(1)),
    )


def test_host_operations_wait_for_each_other_in_one_segment() -> None:
    operations = (
        operation("a", 0, "x"),
        operation("loop", 0, "a", host="a loop"),
        operation("b", 1, "x"),
        operation("if", 1, "b", host="an if"),
        operation("c", 0, "loop if"),
    )
    plan = plan_execution(operations, ["x"], ["c"])
    assert [(piece.captured, piece.runs) for piece in plan.pieces] == [
        (True, (0, 1)),
        (False, (2,)),
        (True, (3,)),
    ]
    assert plan.segments[2].nodes == ("loop", "if")
    assert plan.segments[2].host_reason == "a loop; an if"
    assert plan.device_tensors == {"x", "a", "b", "loop", "if", "c"}


@given(problem=problems())
def test_capture_levels_rise_along_edges_and_tell_the_host_apart(problem: Problem) -> None:
    levels = capture_levels(problem.operations)
    level_of = {o.name: level for o, level in zip(problem.operations, levels, strict=True)}
    for operation_, level in zip(problem.operations, levels, strict=True):
        assert level % 2 == (operation_.host_reason is not None)
        below = [level_of[u] for u, v in problem.links if v == operation_.name]
        assert level >= max(below, default=0)
        assert level <= max(below, default=0) + 1


def test_a_launch_before_the_producer_is_refused_by_name() -> None:
    operations = [operation("reader", 0, "late"), operation("writer", 1, "x", "late")]
    with pytest.raises(PlanError, match=r"'reader' is launched before 'late'"):
        plan_execution(operations, ["x"], ["reader"])


Units = tuple[list[Placement], list[list[int]], Placement]


@st.composite
def units(draw: DrawFn) -> Units:
    """Units over streams, what each depends on, and a main stream that may stay empty."""
    count = draw(st.integers(1, 12))
    placements = [stream(draw(st.integers(0, 3))) for _ in range(count)]
    needs = [
        draw(st.lists(st.integers(0, unit - 1), max_size=4)) if unit else []
        for unit in range(count)
    ]
    return placements, needs, stream(draw(st.integers(0, 3)))


def _waits(drawn: Units) -> set[tuple[object, object]]:
    placements, needs, main = drawn
    waits = required_waits(placements, needs, main)
    return {(u, unit) for unit, before in enumerate(waits.before) for u in before} | {
        (u, END) for u in waits.at_end
    }


def _stream_order(drawn: Units) -> set[tuple[object, object]]:
    placements, _, main = drawn
    lanes: dict[Placement, list[object]] = {main: [START]}
    for unit, placement in enumerate(placements):
        lanes.setdefault(placement, []).append(unit)
    lanes[main].append(END)
    return {pair for lane in lanes.values() for pair in pairwise(lane)}


def _dependencies(drawn: Units) -> set[tuple[object, object]]:
    count, needs = len(drawn[0]), drawn[1]
    inner = {(need, unit) for unit in range(count) for need in needs[unit]}
    return inner | {pair for unit in range(count) for pair in ((START, unit), (unit, END))}


@settings(deadline=None, max_examples=300)
@given(drawn=units())
def test_waits_order_every_dependency_and_each_is_needed(drawn: Units) -> None:
    waits, in_turn, needed = _waits(drawn), _stream_order(drawn), _dependencies(drawn)
    assert needed <= closure(waits | in_turn)
    for wait in waits:
        assert not needed <= closure((waits - {wait}) | in_turn)


@settings(deadline=None, max_examples=300)
@given(drawn=units())
def test_waits_are_the_transitive_reduction_less_stream_order(drawn: Units) -> None:
    in_turn = _stream_order(drawn)
    whole = nx.DiGraph(_dependencies(drawn) | in_turn)
    assert _waits(drawn) == set(nx.transitive_reduction(whole).edges) - in_turn


@settings(deadline=None)
@given(data=st.data(), problem=problems())
def test_segments_can_be_assembled_in_any_order_that_respects_them(
    data: DataObject, problem: Problem
) -> None:
    readers = readers_of(problem.operations, problem.outputs)
    segments = [segment_of([o], readers) for o in problem.operations]
    number = {o.name: i for i, o in enumerate(problem.operations)}
    needs: list[list[int]] = [[] for _ in segments]
    for u, v in problem.links:
        needs[number[v]].append(number[u])
    order = data.draw(topological_orders(needs))
    chosen = data.draw(st.dictionaries(st.sampled_from(order), st.integers(100, 101)))
    streams = {i: replace(segments[i].placement, stream=stream) for i, stream in chosen.items()}
    plan = assemble(segments, problem.inputs, problem.outputs, order, streams)
    check_plan(plan, problem.operations)
    assert [i for piece in plan.pieces for i in piece.runs] == order
    in_turn = [
        (earlier, later)
        for earlier, later in combinations(order, 2)
        if earlier in streams and streams[earlier] == streams.get(later)
    ]
    assert happens_before(plan).issuperset(in_turn)


def _layers(width: int, streams: int, count: int = 5000) -> Sequence[Operation]:
    return [
        operation(
            f"o{i}",
            i % streams,
            " ".join(f"o{j}" for j in {i - width, i - width - i % 3} if j >= 0) or "x",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("width", "streams"), [(1, 1), (8, 8), (40, 16), (1, 4)])
def test_five_thousand_operations_are_planned_in_seconds(width: int, streams: int) -> None:
    operations = _layers(width, streams)
    with at_most_cpu_s(4.0):
        plan = plan_execution(operations, ["x"], ["o4999"])
    assert len({name for segment in plan.segments for name in segment.nodes}) == 5000
