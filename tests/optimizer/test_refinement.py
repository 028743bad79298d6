"""Local search never breaks a schedule, never makes it slower, and ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.refinement import Measure, Refined, refine
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Placement
from support.graphs import durations, graph_of
from support.strategies import GPU, machines, problems

Problem = tuple[OperatorGraph, TableCost]

PROBLEMS = problems().filter(lambda problem: len(problem[0]) > 0)


def predicted(graph: OperatorGraph, cost: TableCost) -> Measure:
    return lambda schedule: simulate(graph, cost, schedule).makespan_us


def refined(
    graph: OperatorGraph,
    start: Schedule,
    machine: Machine,
    measure: Measure,
    is_time_left: Callable[[], bool] = lambda: True,
    seed: int = 0,
) -> Refined:
    return refine(graph, start, machine.placements, measure, is_time_left, seed)


def in_one_stream(graph: OperatorGraph) -> Schedule:
    return Schedule(tuple(Slot(index, Placement(GPU, 0)) for index in range(len(graph))))


@settings(deadline=None, max_examples=50)
@given(
    problem=PROBLEMS,
    machine=machines(max_devices=3),
    policy=st.sampled_from(sorted(POLICIES)),
    noise=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
def test_all_that_is_tried_is_valid_and_what_is_kept_is_not_slower(
    problem: Problem, machine: Machine, policy: str, noise: float, seed: int
) -> None:
    graph, cost = problem
    generator = random.Random(seed)
    times: list[float] = []
    tried: list[Schedule] = []

    def measure(schedule: Schedule) -> float:
        check_schedule(graph, machine, schedule)
        tried.append(schedule)
        exact_us = simulate(graph, cost, schedule).makespan_us
        times.append(exact_us * (1 + noise * generator.random()))
        return times[-1]

    start = POLICIES[policy](graph, cost, machine)
    found = refined(graph, start, machine, measure, seed=seed)
    check_schedule(graph, machine, found.schedule)
    assert tried[0] == start
    assert found.measured_us <= times[0]
    twice = [
        (times[number] + times[number + 1]) / 2
        for number in range(len(times) - 1)
        if tried[number] == tried[number + 1] == found.schedule
    ]
    assert found.measured_us in twice or (found.schedule, found.measured_us) == (start, times[0])
    if not noise:
        assert found.measured_us == simulate(graph, cost, found.schedule).makespan_us


@settings(deadline=None, max_examples=20)
@given(problem=PROBLEMS, machine=machines(), seed=st.integers(0, 99))
def test_the_same_seed_finds_the_same(problem: Problem, machine: Machine, seed: int) -> None:
    graph, cost = problem
    start, measure = in_one_stream(graph), predicted(graph, cost)
    one, other = (refined(graph, start, machine, measure, seed=seed) for _ in range(2))
    assert one == other


@given(problem=PROBLEMS, machine=machines())
def test_without_time_the_start_is_measured_and_kept(problem: Problem, machine: Machine) -> None:
    graph, cost = problem
    start, measure = in_one_stream(graph), predicted(graph, cost)
    found = refined(graph, start, machine, measure, is_time_left=lambda: False)
    assert found == Refined(start, measure(start))


@settings(deadline=None)
@given(data=st.data(), problem=PROBLEMS, machine=machines())
def test_it_asks_for_time_before_each_trial(
    data: DataObject, problem: Problem, machine: Machine
) -> None:
    graph, cost = problem
    left = data.draw(st.integers(0, 20))
    answers = iter([True] * left + [False])
    start, exact = in_one_stream(graph), predicted(graph, cost)
    tried: list[Schedule] = []

    def measure(schedule: Schedule) -> float:
        tried.append(schedule)
        return exact(schedule)

    refined(graph, start, machine, measure, is_time_left=lambda: next(answers))
    assert len(tried) <= 1 + 2 * left


def test_where_nothing_is_faster_it_gives_up() -> None:
    graph = graph_of(6, [(0, 1), (2, 3)])
    start, tried = in_one_stream(graph), list[Schedule]()

    def measure(schedule: Schedule) -> float:
        tried.append(schedule)
        return 5.0

    found = refined(graph, start, Machine((GPU,), 3), measure)
    assert (found.schedule, found.measured_us) == (start, 5.0)
    assert 10 < len(tried) <= 151
    assert len({schedule.shape for schedule in tried}) == len(tried)
    assert start not in tried[1:]
    once = [schedule for schedule, after in pairwise(tried) if schedule != after]
    assert len(once) > 0.9 * len(tried), "what is no faster was measured twice"


def test_what_is_fast_only_once_is_not_taken() -> None:
    graph = graph_of(4, [])
    start, seen = in_one_stream(graph), set[Schedule]()

    def measure(schedule: Schedule) -> float:
        is_first = schedule not in seen
        seen.add(schedule)
        if schedule == start:
            return 10.0
        return 9.0 if is_first else 12.0

    found = refined(graph, start, Machine((GPU,), 2), measure)
    assert len(seen) > 10
    assert (found.schedule, found.measured_us) == (start, 10.0)


def test_independent_operators_are_spread_over_the_streams() -> None:
    graph, cost = graph_of(4, []), durations(3.0, 3.0, 3.0, 3.0)
    measure = predicted(graph, cost)
    for count, expected_us in ((1, 12.0), (2, 6.0), (4, 3.0)):
        found = refined(graph, in_one_stream(graph), Machine((GPU,), count), measure)
        assert found.measured_us == expected_us


def test_the_launch_order_is_searched_too() -> None:
    graph = graph_of(3, [(1, 2)])
    cost = durations(4.0, 1.0, 4.0)
    first, second = Placement(GPU, 0), Placement(GPU, 1)
    start = Schedule((Slot(0, first), Slot(1, first), Slot(2, second)))
    measure = predicted(graph, cost)

    def on_the_same_streams(schedule: Schedule) -> float:
        is_moved = schedule.placement_of != start.placement_of
        return measure(schedule) + 100.0 * is_moved

    found = refined(graph, start, Machine((GPU,), 2), on_the_same_streams)
    assert (measure(start), found.measured_us) == (9.0, 5.0)
    assert [slot.operator for slot in found.schedule.slots] in ([1, 0, 2], [1, 2, 0])


@pytest.mark.parametrize("seed", range(5))
def test_two_chains_find_their_own_streams(seed: int) -> None:
    graph = graph_of(4, [(0, 1), (2, 3)])
    measure = predicted(graph, durations(2.0, 2.0, 2.0, 2.0))
    found = refined(graph, in_one_stream(graph), Machine((GPU,), 2), measure, seed=seed)
    assert found.measured_us == 4.0
