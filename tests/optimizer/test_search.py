"""Local search on the simulator: never worse than what it starts from."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from onnxsched.calibration import TYPICAL
from onnxsched.cost import Contention, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.policies.search import LARGEST, search
from onnxsched.schedule import check_schedule
from onnxsched.simulate import simulate
from support.graphs import durations, graph_of, layered_problem
from support.strategies import GPU, contentions, machines, problems
from support.timing import at_most_cpu_s

Problem = tuple[OperatorGraph, TableCost]


def contended(problem: Problem) -> Problem:
    graph, cost = problem
    shares = tuple(replace(o, sm_share=o.block_share) for o in cost.operators)
    return graph, TableCost(shares, contention=TYPICAL)


@settings(deadline=None, max_examples=200)
@given(problem=problems(), contention=contentions(), machine=machines(max_devices=3))
def test_search_is_valid_and_never_slower_than_what_it_starts_from(
    problem: Problem, contention: Contention, machine: Machine
) -> None:
    graph, cost = problem[0], replace(problem[1], contention=contention)
    found = POLICIES["search"](graph, cost, machine)
    check_schedule(graph, machine, found)
    assert found == POLICIES["search"](graph, cost, machine)
    found_us = simulate(graph, cost, found).makespan_us
    for rival in ("heft", "hios-lp", "sequential"):
        schedule = POLICIES[rival](graph, cost, machine)
        assert found_us <= simulate(graph, cost, schedule).makespan_us


def test_steps_improve_even_on_heft() -> None:
    graph, cost = contended(layered_problem(12, 8, seed=3))
    machine = Machine((GPU,), 3)
    found_us = simulate(graph, cost, search(graph, cost, machine)).makespan_us
    heft_us = simulate(graph, cost, POLICIES["heft"](graph, cost, machine)).makespan_us
    assert found_us < heft_us


def test_streams_that_gain_nothing_are_given_up() -> None:
    graph = graph_of(12, [])
    cost = durations(64.0, *[1.0] * 11)
    assert search(graph, cost, Machine((GPU,), 12)).stream_count <= 4
    assert simulate(graph, cost, search(graph, cost, Machine((GPU,), 12))).makespan_us == 64.0


def test_three_hundred_operators_take_seconds() -> None:
    graph, cost = contended(layered_problem(30, 10, seed=0))
    with at_most_cpu_s(5.0):
        search(graph, cost, Machine((GPU,), 16))


def test_a_large_graph_is_only_list_scheduled() -> None:
    graph, cost = contended(layered_problem(100, 100, seed=0))
    assert len(graph) > LARGEST
    with at_most_cpu_s(10.0):
        check_schedule(graph, Machine((GPU,), 16), search(graph, cost, Machine((GPU,), 16)))
