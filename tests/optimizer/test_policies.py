"""The laws of every policy, and what sets each apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.policies.heft import earliest_finish
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import critical_path_us, simulate, total_us
from onnxsched_runtime.device import Device, Placement
from support import oracles
from support.graphs import durations, graph_of, linear
from support.strategies import GPU, machines, problems
from support.timing import at_most_cpu_s
from tools.synthetic_graphs import synthetic_problem

Problem = tuple[OperatorGraph, TableCost]


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=300)
@given(problem=problems(), machine=machines())
def test_schedules_are_valid_deterministic_and_within_bounds(
    name: str, problem: Problem, machine: Machine
) -> None:
    graph, cost = problem
    schedule = POLICIES[name](graph, cost, machine)
    check_schedule(graph, machine, schedule)
    assert schedule == POLICIES[name](graph, cost, machine)
    makespan_us = simulate(graph, cost, schedule).makespan_us
    work_us = total_us(graph, cost, GPU)
    assert critical_path_us(graph, cost, GPU) <= makespan_us <= work_us
    assert makespan_us >= work_us / machine.stream_count


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(problem=problems(), machine=machines(max_devices=3))
def test_schedules_are_valid_on_several_devices(
    name: str, problem: Problem, machine: Machine
) -> None:
    graph, cost = problem
    schedule = POLICIES[name](graph, cost, machine)
    check_schedule(graph, machine, schedule)
    makespan_us = simulate(graph, cost, schedule).makespan_us
    assert makespan_us >= critical_path_us(graph, cost, GPU)


@settings(deadline=None)
@given(problem=problems(), machine=machines())
def test_sequential_takes_exactly_the_sum(problem: Problem, machine: Machine) -> None:
    graph, cost = problem
    schedule = POLICIES["sequential"](graph, cost, machine)
    assert simulate(graph, cost, schedule).makespan_us == total_us(graph, cost, GPU)


@pytest.mark.parametrize("name", ["opara", "nimble", "heft"])
@settings(deadline=None)
@given(problem=problems())
def test_enough_streams_leave_only_the_critical_path(name: str, problem: Problem) -> None:
    graph, cost = problem
    machine = Machine((GPU,), stream_count=max(1, len(graph)))
    schedule = POLICIES[name](graph, cost, machine)
    assert simulate(graph, cost, schedule).makespan_us == critical_path_us(graph, cost, GPU)


@pytest.mark.parametrize("name", ["opara", "nimble", "heft"])
def test_streams_of_finished_branches_are_reused(name: str) -> None:
    blocks = [
        link
        for fork in (0, 4, 8)
        for middle in (fork + 1, fork + 2, fork + 3)
        for link in ((fork, middle), (middle, fork + 4))
    ]
    graph = graph_of(13, blocks)
    schedule = POLICIES[name](graph, durations(*[1.0] * 13), Machine((GPU,), 13))
    assert schedule.stream_count == 3


def test_wavefront_launches_by_level_and_balances_each() -> None:
    graph = graph_of(6, [(0, 1), (0, 2), (0, 3), (1, 5)])
    cost = durations(1.0, 2.0, 5.0, 3.0, 9.0, 1.0)
    schedule = POLICIES["wavefront"](graph, cost, Machine((GPU,), 2))
    launched = [(slot.operator, slot.placement.stream) for slot in schedule.slots]
    assert launched == [(4, 0), (0, 1), (2, 0), (3, 1), (1, 1), (5, 0)]


def test_heft_fills_idle_gaps() -> None:
    graph = graph_of(4, [(0, 1), (0, 2)])
    cost = durations(4.0, 9.0, 8.0, 3.0)
    schedule = POLICIES["heft"](graph, cost, Machine((GPU,), 2))
    assert simulate(graph, cost, schedule).starts_us == (0.0, 4.0, 4.0, 0.0)
    assert schedule.placement_of[3] == schedule.placement_of[2]


def test_heft_stays_on_the_stream_of_the_last_predecessor_where_it_can() -> None:
    graph = graph_of(5, [(0, 3), (2, 3), (0, 4), (1, 4)])
    cost = durations(1.0, 2.0, 3.0, 5.0, 1.0)
    schedule = POLICIES["heft"](graph, cost, Machine((GPU,), 3))
    streams = [schedule.placement_of[operator].stream for operator in range(5)]
    assert streams == [1, 2, 0, 0, 2]


def test_heft_uses_a_second_device_only_where_the_transfer_pays() -> None:
    graph = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    machine = Machine((GPU, Device("cuda", 1)), 1)
    slow, fast = (
        durations(1.0, 8.0, 8.0, 1.0, unmeasured=linear(us, 1024.0)) for us in (16.0, 1.0)
    )
    on_one = POLICIES["heft"](graph, slow, machine)
    assert set(on_one.placement_of.values()) == {Placement(GPU, 0)}
    on_two = POLICIES["heft"](graph, fast, machine)
    assert on_two.stream_count == 2
    assert simulate(graph, fast, on_two).makespan_us < simulate(graph, fast, on_one).makespan_us


@settings(deadline=None, max_examples=200)
@given(problem=problems(), machine=machines(max_devices=3))
def test_heft_launches_in_the_order_in_which_operators_run(
    problem: Problem, machine: Machine
) -> None:
    graph, cost = problem
    schedule = POLICIES["heft"](graph, cost, machine)
    timeline = simulate(graph, cost, schedule)
    intervals = [
        (timeline.starts_us[slot.operator], timeline.finishes_us[slot.operator])
        for slot in schedule.slots
    ]
    assert intervals == sorted(intervals)


@settings(deadline=None, max_examples=300)
@given(problem=problems(), machine=machines(max_devices=2))
def test_heft_equals_a_search_of_all_intervals(problem: Problem, machine: Machine) -> None:
    graph, cost = problem
    found = earliest_finish(graph, cost, machine)
    assert found is not None
    assert found.placement_of == oracles.heft(graph, cost, machine)


@settings(deadline=None)
@given(problem=problems(), machine=machines(max_devices=3))
def test_rank_order_is_topological(problem: Problem, machine: Machine) -> None:
    graph, cost = problem
    assert oracles.is_topological(
        graph, rank_order(upward_ranks_us(graph, cost, *machine.devices))
    )


def test_upward_rank_counts_mean_transfers() -> None:
    graph = graph_of(2, [(0, 1)])
    cost = durations(2.0, 3.0, unmeasured=linear(4.0, 1.0))
    assert upward_ranks_us(graph, cost, GPU) == (5.0, 3.0)
    assert upward_ranks_us(graph, cost, GPU, Device("cuda", 1)) == (10.0, 3.0)


@pytest.mark.parametrize("family", ["layered", "nasnet"])
def test_ten_thousand_operators_take_seconds(family: str) -> None:
    graph, cost = synthetic_problem(family, 10_000)
    machine = Machine((GPU,), 16)
    for name, policy in POLICIES.items():
        with at_most_cpu_s(10.0, name):
            check_schedule(graph, machine, policy(graph, cost, machine))


def test_heft_does_not_pass_over_every_gap() -> None:
    """Gaps of 12 us, which nothing but an operator of no time at all would fit into."""
    count = 3000
    chain = [(v - 1, v) for v in range(1, count)]
    readers = [(v, count + v) for v in range(count)]
    last = [(count + v, 3 * count) for v in range(count)]
    graph = graph_of(3 * count + 2, [*chain, *readers, *last, (0, 3 * count + 1)])
    times = [*[15.0] * count, *[5.0] * count, *[12.0] * count, 100.0, 0.0]
    cost, machine = durations(*times), Machine((GPU,), 4)
    with at_most_cpu_s(3.0):
        check_schedule(graph, machine, earliest_finish(graph, cost, machine) or Schedule(()))
