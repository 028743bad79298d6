"""The laws of every policy on one to eight devices, any transfers, any memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from onnxsched.cost import Contention, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.policies import POLICIES, SPREADING
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import critical_path_us, simulate, total_us
from onnxsched_runtime.errors import RoomError
from support.graphs import durations, graph_of, linear
from support.strategies import DEVICES, GPU, device_problems

Problem = tuple[OperatorGraph, TableCost, Machine]


def answer(name: str, problem: Problem) -> Schedule | None:
    """The policy's schedule; None where the policy finds that the model does not fit."""
    try:
        return POLICIES[name](*problem)
    except RoomError:
        return None


def fits(problem: Problem, schedule: Schedule) -> bool:
    graph, _, machine = problem
    order = [slot.operator for slot in schedule.slots]
    return too_full(graph, machine, order, schedule.placement_of) is None


ROUNDING = 1e-12
"""Times are sums of many."""


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=100)
@given(problem=device_problems())
def test_schedules_are_valid_deterministic_and_within_bounds(name: str, problem: Problem) -> None:
    graph, cost, machine = problem
    schedule = answer(name, problem)
    assert schedule == answer(name, problem)
    if schedule is None:
        assert name in SPREADING
        return
    if name in SPREADING:
        check_schedule(graph, machine, schedule)
    else:
        check_schedule(graph, replace(machine, memory_nbytes={}), schedule)
        assert {place.device for place in schedule.placement_of.values()} <= {GPU}
    makespan_us = simulate(graph, cost, schedule).makespan_us * (1 + ROUNDING)
    work_us = total_us(graph, cost, GPU)
    assert makespan_us >= critical_path_us(graph, cost, GPU)
    assert makespan_us >= work_us / len(machine.placements)
    if machine.stream_count == 1:
        assert makespan_us >= work_us / len(machine.devices)


@pytest.mark.parametrize("name", SPREADING)
@settings(deadline=None, max_examples=100)
@given(problem=device_problems())
def test_several_devices_are_never_slower_than_one(name: str, problem: Problem) -> None:
    graph, cost, machine = problem
    alone = answer(name, (graph, cost, machine.alone))
    if alone is None:
        return
    found = answer(name, problem)
    assert found is not None
    found_us = simulate(graph, cost, found).makespan_us
    assert found_us <= simulate(graph, cost, alone).makespan_us
    if name != "heft":  # which knows neither contention nor overheads
        sequential = POLICIES["sequential"](graph, cost, machine.alone)
        if fits(problem, sequential):
            assert found_us <= simulate(graph, cost, sequential).makespan_us


@pytest.mark.parametrize("name", SPREADING)
@settings(deadline=None, max_examples=50)
@given(problem=device_problems())
def test_transfers_that_never_pay_leave_one_device(name: str, problem: Problem) -> None:
    graph, cost, machine = problem
    chain = graph_of(len(graph), [(v, v + 1) for v in range(len(graph) - 1)])
    slow = replace(cost, transfers={}, unmeasured=linear(1.0, 1.0))
    found = POLICIES[name](chain, slow, replace(machine, memory_nbytes={}))
    assert len({place.device for place in found.placement_of.values()}) <= 1


@pytest.mark.parametrize("name", SPREADING)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_independent_operators_use_every_device(name: str, count: int) -> None:
    graph = graph_of(16, [])
    found = POLICIES[name](graph, durations(*[8.0] * 16), Machine(DEVICES[:count], 1))
    assert simulate(graph, durations(*[8.0] * 16), found).makespan_us == 128.0 / count


@pytest.mark.parametrize("name", SPREADING)
def test_operators_that_slow_each_other_are_parted(name: str) -> None:
    graph = graph_of(8, [(0, v) for v in range(1, 7)] + [(v, 7) for v in range(1, 7)])
    cost = replace(durations(*[16.0] * 8), contention=Contention(sm_slowdown=1.0))
    cost = replace(cost, operators=tuple(replace(o, sm_share=1.0) for o in cost.operators))
    machine = Machine(DEVICES[:2], 4)
    found = POLICIES[name](graph, replace(cost, unmeasured=linear(1.0, 1024.0)), machine)
    assert len({place.device for place in found.placement_of.values()}) == 2
