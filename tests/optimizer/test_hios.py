"""HIOS's two mappings and its sliding window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import Contention, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies.hios_lp import PART_SIZE, Queues, hios_lp, map_paths
from onnxsched.policies.hios_mr import hios_mr, record_mappings
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.simulate import simulate, total_us
from onnxsched.windows import HORIZON, PartialSchedule, Unlaunched, slide, with_windows
from onnxsched_runtime.device import Placement
from support.graphs import durations, graph_of, layered_problem, linear
from support.strategies import DEVICES, GPU, device_problems, problems
from support.timing import at_most_cpu_s
from tools.synthetic_graphs import synthetic_problem

Problem = tuple[OperatorGraph, TableCost, Machine]


def ranked(graph: OperatorGraph, cost: TableCost, machine: Machine) -> list[int]:
    return rank_order(upward_ranks_us(graph, cost, *machine.devices))


def one_stream_each(order: list[int], number_of: list[int], machine: Machine) -> Schedule:
    devices = machine.devices
    return Schedule(tuple(Slot(v, Placement(devices[number_of[v]], 0)) for v in order))


@settings(deadline=None, max_examples=200)
@given(problem=device_problems(), data=st.data())
def test_queues_run_as_the_simulator_says(problem: Problem, data: st.DataObject) -> None:
    graph, cost, machine = problem
    cost = replace(cost, contention=replace(cost.contention, link_share=0.0))
    order = ranked(*problem)
    numbers = st.integers(0, len(machine.devices) - 1)
    number_of = data.draw(st.lists(numbers, min_size=len(graph), max_size=len(graph)))
    finish_us = [0.0] * len(graph)
    cut = data.draw(st.integers(0, len(graph)))
    queues = Queues.of(graph, cost, machine)
    free_us = queues.run(order[:cut], number_of, finish_us, [0.0] * len(machine.devices))
    free_us = queues.run(order[cut:], number_of, finish_us, free_us)
    timeline = simulate(graph, cost, one_stream_each(order, number_of, machine))
    assert finish_us == pytest.approx(timeline.finishes_us)
    assert max(free_us) == pytest.approx(timeline.makespan_us)


@settings(deadline=None)
@given(problem=problems(5))
def test_recorded_mappings_of_two_operators_are_the_best(
    problem: tuple[OperatorGraph, TableCost],
) -> None:
    """With more, a mapping that pays later may not be recorded."""
    graph, cost = problem
    pair = OperatorGraph(graph.operators[:2], tuple(e for e in graph.edges if e.consumer < 2))
    machine = Machine(DEVICES[:3], 1)
    order = ranked(pair, cost, machine)

    def makespan_us(numbers: tuple[int, ...]) -> float:
        return simulate(pair, cost, one_stream_each(order, [*numbers], machine)).makespan_us

    found = tuple(record_mappings(pair, cost, machine, order))
    assert makespan_us(found) == min(
        map(makespan_us, product(range(3), repeat=len(pair))), default=0.0
    )


def test_the_longest_path_goes_first_and_others_beside_it() -> None:
    graph = graph_of(6, [(0, 1), (1, 5), (0, 2), (2, 5), (3, 4)])
    cost = durations(1.0, 8.0, 6.0, 2.0, 2.0, 1.0, unmeasured=linear(0.5, 1 << 20))
    machine = Machine(DEVICES[:2], 1)
    number_of = map_paths(Queues.of(graph, cost, machine), ranked(graph, cost, machine))
    assert [number_of[v] for v in (0, 1, 5)] == [0, 0, 0]
    assert number_of[2] == 1


def test_all_inputs_have_to_arrive_not_only_the_first() -> None:
    """What HIOS's code gets wrong: it looks at the first predecessor alone."""
    graph = graph_of(3, [(0, 2), (1, 2)])
    cost = durations(8.0, 8.0, 1.0, unmeasured=linear(4.0, 1 << 20))
    machine = Machine(DEVICES[:2], 1)
    for policy in (hios_lp, hios_mr):
        found = policy(graph, cost, machine)
        assert simulate(graph, cost, found).makespan_us == pytest.approx(13.0, abs=0.01)


@pytest.mark.parametrize("policy", [hios_lp, hios_mr])
@pytest.mark.parametrize("width", [1, 2, 3, 50])
@settings(deadline=None, max_examples=50)
@given(problem=device_problems())
def test_any_window_gives_a_valid_schedule(
    policy: Callable[..., Schedule], width: int, problem: Problem
) -> None:
    graph, cost, machine = problem
    free = replace(machine, memory_nbytes={})
    schedule = policy(graph, cost, free, window=width)
    check_schedule(graph, free, schedule)
    if width == 1:
        assert {place.stream for place in schedule.placement_of.values()} <= {0}
    on_one = total_us(graph, cost, GPU) * cost.contention.duration_factor
    on_one += len(graph) * cost.contention.start_us
    assert simulate(graph, cost, schedule).makespan_us <= on_one * (1 + 1e-12)


@settings(deadline=None, max_examples=200)
@given(problem=device_problems(), width=st.integers(2, 6), data=st.data())
def test_stages_finish_as_the_simulator_says(
    problem: Problem, width: int, data: st.DataObject
) -> None:
    graph, cost, machine = problem
    overheads = replace(cost.contention, sm_slowdown=0.0, launch_slowdown=0.0, link_share=0.0)
    cost = replace(cost, contention=overheads)
    devices = data.draw(
        st.lists(st.sampled_from(machine.devices), min_size=len(graph), max_size=len(graph))
    )
    partial = PartialSchedule(graph, cost, devices)
    schedule = slide(partial, ranked(*problem), width, machine.stream_count)
    check_schedule(graph, replace(machine, memory_nbytes={}), schedule)
    timeline = simulate(graph, cost, schedule)
    assert partial.finish_us == pytest.approx(timeline.finishes_us)


@given(st.permutations(range(9)), st.lists(st.integers(0, 8)), st.integers(0, 10))
def test_what_is_launched_in_any_order_is_passed_over(
    operators: list[int], launches: list[int], count: int
) -> None:
    is_launched = bytearray(9)
    unlaunched = Unlaunched(operators, is_launched)
    for launched in launches:
        is_launched[launched] = 1
        left = [operator for operator in operators if not is_launched[operator]]
        assert unlaunched.first(count) == left[:count]


def test_a_window_finds_neighbours_that_are_not_adjacent() -> None:
    graph = graph_of(4, [(0, 1)])
    cost = durations(4.0, 4.0, 3.0, 3.0)
    machine = Machine((GPU,), 2)
    makespan_us = {
        width: simulate(
            graph, cost, with_windows(graph, cost, machine, [0, 1, 2, 3], [GPU] * 4, width)
        ).makespan_us
        for width in (1, 2, 3)
    }
    assert makespan_us == {1: 14.0, 2: 11.0, 3: 8.0}


def test_operators_that_fill_the_device_stay_on_one_stream() -> None:
    graph, cost = layered_problem(3, 4, seed=1)
    full = tuple(replace(operator, sm_share=1.0) for operator in cost.operators)
    contention = Contention(event_us=1.0, sm_slowdown=1.0)
    cost = replace(cost, operators=full, contention=contention)
    found = hios_lp(graph, cost, Machine((GPU,), 4))
    assert found.stream_count == 1


def test_a_graph_larger_than_any_part_or_horizon_gains_on_every_device() -> None:
    graph, cost = layered_problem(50, 16, seed=2)
    assert len(graph) > max(PART_SIZE, HORIZON)
    cost = replace(cost, unmeasured=linear(1.0, 1 << 20))
    work_us = total_us(graph, cost, GPU)
    for policy, count in product((hios_lp, hios_mr), (2, 4)):
        found = partial(policy, window=1)(graph, cost, Machine(DEVICES[:count], 1))
        assert simulate(graph, cost, found).makespan_us < 1.1 * work_us / count


@pytest.mark.parametrize("family", ["random", "series-parallel"])
def test_eight_devices_and_ten_thousand_operators_take_seconds(family: str) -> None:
    graph, cost = synthetic_problem(family, 10_000)
    machine = Machine(DEVICES, 4)
    for policy in (hios_lp, hios_mr):
        with at_most_cpu_s(10.0):
            check_schedule(graph, machine, policy(graph, cost, machine))
