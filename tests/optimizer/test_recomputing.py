"""What is computed twice is the same, valid, and never makes a schedule longer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched import recomputing
from onnxsched.calibration import TYPICAL
from onnxsched.cost import OperatorCost, TableCost
from onnxsched.duplication import duplicated
from onnxsched.graph import Edge, Operator, OperatorGraph, Weight
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.policies.heft import heft
from onnxsched.recomputing import WORK_LIMIT, Recomputation, recompute
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.simulate import simulate
from support.graphs import durations, graph_of, layered_problem, linear
from support.models import feeds_for, random_models, reference
from support.optimizing import as_it_is
from support.strategies import DEVICES, device_problems
from support.timing import at_most_cpu_s

Scheduled = tuple[OperatorGraph, TableCost, Machine, Schedule]


@st.composite
def scheduled_problems(draw: DrawFn) -> Scheduled:
    """Operators in their order on any streams of any devices, where these have the room."""
    graph, cost, machine = draw(device_problems())
    return graph, cost, *placed(draw, graph, machine)


def placed(draw: DrawFn, graph: OperatorGraph, machine: Machine) -> tuple[Machine, Schedule]:
    places = [draw(st.sampled_from(machine.placements)) for _ in range(len(graph))]
    schedule = Schedule(tuple(Slot(v, place) for v, place in enumerate(places)))
    if too_full(graph, machine, range(len(graph)), schedule.placement_of):
        machine = replace(machine, memory_nbytes={})
    return machine, schedule


def assert_equivalent(before: Scheduled, after: Recomputation) -> None:
    """Copies read what their originals do; all else stays, but for where readers read."""
    graph, cost, machine, schedule = before
    check_schedule(after.graph, machine, after.schedule)
    sources = after.cost.sources
    copies = {duplicate.copy: duplicate for duplicate in after.duplicates}
    names = [operator.name for operator in after.graph.operators]
    assert [name for name in names if name not in copies] == [o.name for o in graph.operators]
    for operator, source in enumerate(sources):
        reads = Counter((sources[e.producer], e.nbytes) for e in after.graph.incoming[operator])
        assert reads == Counter((e.producer, e.nbytes) for e in graph.incoming[source])
        assert after.cost.operator(operator, DEVICES[0]) == cost.operators[source]
        placement = after.schedule.placement_of[operator]
        if names[operator] in copies:
            readers = {edge.consumer for edge in after.graph.outgoing[operator]}
            assert {names[v] for v in readers} == set(copies[names[operator]].consumers)
            first = next(s.operator for s in after.schedule.slots if s.operator in readers)
            assert placement == after.schedule.placement_of[first]
            assert placement.device != schedule.placement_of[source].device
            assert after.graph.outgoing[operator]
        else:
            assert placement == schedule.placement_of[source]


@settings(deadline=None, max_examples=300)
@given(problem=scheduled_problems(), limit=st.sampled_from([0, 40, WORK_LIMIT, WORK_LIMIT]))
def test_computing_twice_is_never_longer(problem: Scheduled, limit: int) -> None:
    graph, cost, machine, schedule = problem
    size = len(graph) + len(graph.edges)
    with (
        mock.patch.object(recomputing, "WORK_LIMIT", limit),
        mock.patch.object(recomputing, "simulate", wraps=simulate) as simulated,
    ):
        found = recompute(graph, cost, machine, schedule)
    assert (simulated.call_count - 1) * size <= limit
    before_us = simulate(graph, cost, schedule).makespan_us
    after_us = simulate(found.graph, found.cost, found.schedule).makespan_us
    assert (after_us < before_us) if found.duplicates else (after_us == before_us)
    assert_equivalent(problem, found)


def shared(op_type: str = "Op", *, host_reason: str | None = None) -> Scheduled:
    """A short operator that two long ones read, one of them on another device."""
    graph = graph_of(3, [(0, 1), (0, 2)])
    short = Operator("short", op_type, host_reason)
    edges = tuple(replace(edge, tensor="result") for edge in graph.edges)
    graph = OperatorGraph((short, *graph.operators[1:]), edges)
    machine = Machine(DEVICES[:2], 1)
    first, second = machine.placements
    schedule = Schedule((Slot(0, first), Slot(1, first), Slot(2, second)))
    return graph, durations(1, 20, 20, unmeasured=linear(10.0, 1024.0)), machine, schedule


def test_a_short_operator_is_computed_where_its_result_is_needed() -> None:
    graph, cost, machine, schedule = shared()
    found = recompute(graph, cost, machine, schedule)
    [duplicate] = found.duplicates
    assert (duplicate.operator, duplicate.copy) == ("short", "short/copy")
    assert duplicate.consumers == ("operator_2",)
    copy = [operator.name for operator in found.graph.operators].index("short/copy")
    assert found.schedule.placement_of[copy] == machine.placements[1]
    assert simulate(found.graph, found.cost, found.schedule).makespan_us == 21


def side_by_side(one: OperatorGraph, other: OperatorGraph) -> OperatorGraph:
    """Two graphs that have nothing to do with each other."""
    shift = len(one)
    operators = [replace(o, name=f"other_{o.name}") for o in other.operators]
    edges = [
        Edge(e.producer + shift, e.consumer + shift, f"other_{e.tensor}", e.nbytes)
        for e in other.edges
    ]
    return OperatorGraph((*one.operators, *operators), (*one.edges, *edges))


def test_where_not_all_can_be_tried_what_all_wait_for_is() -> None:
    graph, cost, _, schedule = shared()
    short = replace(cost, operators=durations(1, 4, 4).operators)
    twice = side_by_side(graph, graph)
    both = replace(cost, operators=(*cost.operators, *short.operators))
    machine = Machine(DEVICES[:2], 2)
    places = [slot.placement for slot in schedule.slots]
    places += [replace(place, stream=1) for place in places]
    spread = Schedule(tuple(Slot(v, place) for v, place in enumerate(places)))
    with mock.patch.object(recomputing, "WORK_LIMIT", len(twice) + len(twice.edges)):
        [duplicate] = recompute(twice, both, machine, spread).duplicates
    assert duplicate.operator == "short"


def test_a_large_graph_takes_seconds() -> None:
    """With one simulation for each copy that could pay this one took a minute."""
    graph, cost = layered_problem(700, 6, seed=0)
    edges = tuple(replace(edge, tensor=f"tensor_{edge.producer}") for edge in graph.edges)
    graph = replace(graph, edges=edges)
    short = tuple(replace(o, duration_us=o.duration_us / 4) for o in cost.operators)
    cost = replace(cost, operators=short, contention=TYPICAL)
    machine = Machine(DEVICES[:2], 4)
    schedule = heft(graph, cost, machine)
    with at_most_cpu_s(20.0):
        recompute(graph, cost, machine, schedule)


def test_not_what_differs_each_time_or_runs_on_the_host_or_finds_no_room() -> None:
    assert not recompute(*shared("RandomNormal")).duplicates
    assert not recompute(*shared("Dropout")).duplicates
    assert not recompute(*shared(host_reason="host")).duplicates
    graph, cost, machine, schedule = shared()
    wide = replace(graph.operators[0], scratch_nbytes=100)
    graph = OperatorGraph((wide, *graph.operators[1:]), graph.edges)
    for room_nbytes, count in ((100, 0), (101, 1)):
        limited = replace(machine, memory_nbytes={DEVICES[1]: room_nbytes})
        assert len(recompute(graph, cost, limited, schedule).duplicates) == count


def test_not_where_what_it_reads_takes_as_long_to_come() -> None:
    graph, cost, machine, schedule = shared()
    edges = [replace(e, producer=e.producer + 1, consumer=e.consumer + 1) for e in graph.edges]
    root = replace(graph.operators[0], name="root")
    graph = OperatorGraph(
        (root, *graph.operators), (replace(graph.edges[0], tensor="input"), *edges)
    )
    cost = replace(cost, operators=(cost.operators[0], *cost.operators))
    slots = [replace(slot, operator=slot.operator + 1) for slot in schedule.slots]
    schedule = Schedule((schedule.slots[0], *slots))
    assert not recompute(graph, cost, machine, schedule).duplicates


@pytest.mark.parametrize(("kept_nbytes", "count"), [(0, 0), (1, 1)])
def test_only_what_is_still_needed_where_it_was_is_computed_twice(
    kept_nbytes: int, count: int
) -> None:
    graph, cost, machine, schedule = shared()
    short = replace(graph.operators[0], kept_nbytes=kept_nbytes)
    graph = replace(graph, operators=(short, *graph.operators[1:]))
    first, *readers = schedule.slots
    elsewhere = [replace(slot, placement=machine.placements[1]) for slot in readers]
    found = recompute(graph, cost, machine, Schedule((first, *elsewhere)))
    assert len(found.duplicates) == count


@pytest.mark.parametrize(("nbytes", "count"), [(1 << 20, 0), (16, 1)])
def test_inputs_of_the_model_have_to_come_too(nbytes: int, count: int) -> None:
    graph, cost, machine, schedule = shared()
    for is_input, expected in ((True, count), (False, 1)):
        weights = (Weight("image", nbytes, is_input=is_input),)
        reading = replace(graph.operators[0], weights=weights)
        edges = tuple(replace(edge, nbytes=4096) for edge in graph.edges)
        read = OperatorGraph((reading, *graph.operators[1:]), edges)
        assert len(recompute(read, cost, machine, schedule).duplicates) == expected


@st.composite
def scheduled_models(draw: DrawFn) -> tuple[Model, Scheduled]:
    """Models on up to three devices, between which transfers take longer than most operators."""
    model = as_it_is(draw(random_models(max_nodes=10)))
    graph = graph_from_model(model)
    costs = [OperatorCost(draw(st.sampled_from([1.0, 8.0]))) for _ in graph.operators]
    cost = TableCost(tuple(costs), unmeasured=linear(16.0, 1.0))
    return model, (graph, cost, *placed(draw, graph, Machine(DEVICES[:3], 1)))


@settings(deadline=None, max_examples=200)
@given(problem=scheduled_models())
def test_the_model_with_copies_is_that_of_the_graph_and_computes_the_same(
    problem: tuple[Model, Scheduled],
) -> None:
    model, scheduled = problem
    found = recompute(*scheduled)
    result = duplicated(model, found.duplicates)
    assert result.rewrite == model.rewrite
    again = graph_from_model(result)
    assert again.operators == found.graph.operators
    assert [(e.producer, e.consumer, e.nbytes) for e in again.edges] == [
        (e.producer, e.consumer, e.nbytes) for e in found.graph.edges
    ]
    feeds = feeds_for(model.proto)
    for one, other in zip(
        reference(result.proto, feeds), reference(model.proto, feeds), strict=True
    ):
        np.testing.assert_array_equal(one, other)
