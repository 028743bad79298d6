"""The exact scheduler: no policy beats it, nor does any schedule tried one by one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import TableCost
from onnxsched.exact import exact
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.simulate import critical_path_us, simulate, total_us
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from support.graphs import durations, graph_of, layered_problem
from support.oracles import is_topological
from support.strategies import GPU, machines, problems

Problem = tuple[OperatorGraph, TableCost]


needs_ortools = pytest.mark.skipif(
    find_spec("ortools") is None,
    reason="OR-Tools is not installed; it has no wheel for some Pythons and systems",
)


def least_makespan_us(problem: Problem, machine: Machine) -> float:
    """The smallest makespan of all launch orders on all placements. Exponential."""
    graph, cost = problem
    return min(
        simulate(graph, cost, Schedule(tuple(map(Slot, order, chosen)))).makespan_us
        for order in permutations(range(len(graph)))
        if is_topological(graph, list(order))
        for chosen in product(machine.placements, repeat=len(graph))
    )


@needs_ortools
@settings(deadline=None, max_examples=60)
@given(
    problem=problems(max_operators=4),
    device_count=st.integers(1, 2),
    stream_count=st.integers(1, 2),
)
def test_no_schedule_at_all_is_shorter(
    problem: Problem, device_count: int, stream_count: int
) -> None:
    machine = Machine((GPU, Device("cuda", 1))[:device_count], stream_count)
    found = exact(*problem, machine)
    assert found.is_optimal
    assert found.makespan_us == found.lower_bound_us == least_makespan_us(problem, machine)


@needs_ortools
@settings(deadline=None, max_examples=100)
@given(problem=problems(max_operators=8), machine=machines(max_devices=2))
def test_no_policy_is_shorter_and_the_claims_hold(problem: Problem, machine: Machine) -> None:
    graph, cost = problem
    found = exact(graph, cost, machine)
    check_schedule(graph, machine, found.schedule)
    assert found.is_optimal
    assert found.makespan_us == simulate(graph, cost, found.schedule).makespan_us
    assert found.makespan_us == found.lower_bound_us
    assert found.makespan_us >= critical_path_us(graph, cost, GPU)
    assert found.makespan_us >= total_us(graph, cost, GPU) / len(machine.placements)
    for name, policy in POLICIES.items():
        makespan_us = simulate(graph, cost, policy(graph, cost, machine)).makespan_us
        assert found.makespan_us <= makespan_us, name


@needs_ortools
@settings(deadline=None, max_examples=30)
@given(problem=problems(max_operators=10), machine=machines(max_devices=2))
def test_the_same_question_has_the_same_answer(problem: Problem, machine: Machine) -> None:
    assert exact(*problem, machine) == exact(*problem, machine)


@needs_ortools
def test_the_bound_holds_where_times_are_no_whole_nanoseconds() -> None:
    graph, cost = graph_of(3, []), durations(1.00049, 2.00099, 3.0009)
    found = exact(graph, cost, Machine((GPU,), 2))
    assert found.is_optimal
    assert found.lower_bound_us <= found.makespan_us == pytest.approx(3.00148)
    assert found.makespan_us <= found.lower_bound_us + len(graph) * 1e-3


@needs_ortools
def test_greedy_is_not_enough() -> None:
    """The longest first, and each where it finishes first, leaves the two long ones apart."""
    graph = graph_of(5, [])
    cost = durations(3.0, 3.0, 2.0, 2.0, 2.0)
    machine = Machine((GPU,), 2)
    heft = POLICIES["heft"](graph, cost, machine)
    assert simulate(graph, cost, heft).makespan_us == 7.0
    assert exact(graph, cost, machine).makespan_us == 6.0


@needs_ortools
@pytest.mark.parametrize("time_limit_s", [1e-6, 0.5])
def test_a_time_limit_leaves_a_schedule_without_proof(time_limit_s: float) -> None:
    graph, cost = layered_problem(layer_count=12, width=10, seed=0)
    machine = Machine((GPU,), 3)
    found = exact(graph, cost, machine, time_limit_s=time_limit_s)
    check_schedule(graph, machine, found.schedule)
    assert not found.is_optimal
    assert found.lower_bound_us < found.makespan_us <= total_us(graph, cost, GPU)


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match=r"time limit of 0 s is too short; give more than 0\."):
        exact(graph_of(1, []), durations(1.0), Machine((GPU,), 1), time_limit_s=0)


def test_without_ortools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(UsageError, match=r"pip install ortools\.$"):
        exact(graph_of(1, []), durations(1.0), Machine((GPU,), 1))
