"""What the policies propose, before anything is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.candidates import STREAM_COUNTS, Candidate, propose
from onnxsched.contraction import Contraction, contract_chains
from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES, SPREADING
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Placement
from support.graphs import durations, graph_of, layered_problem
from support.strategies import DEVICES, GPU, device_problems, problems

Problem = tuple[OperatorGraph, TableCost]


def proposed(
    problem: Problem, cap: int, policies: tuple[str, ...] = tuple(POLICIES)
) -> tuple[Candidate, ...]:
    graph, cost = problem
    return propose(graph, contract_chains(graph), cost, Machine((GPU,), cap), policies)


def shape(schedule: Schedule) -> list[tuple[int, int]]:
    """Operators and streams in launch order, streams numbered as they come."""
    number: dict[Placement, int] = {}
    return [(s.operator, number.setdefault(s.placement, len(number))) for s in schedule.slots]


@settings(deadline=None)
@given(problem=problems(), cap=st.integers(1, 5))
def test_candidates_are_valid_distinct_and_within_the_cap(problem: Problem, cap: int) -> None:
    graph, cost = problem
    candidates = proposed(problem, cap)
    assert candidates[0].policy == "sequential"
    assert candidates[0].stream_count <= 1
    assert [c.policy for c in candidates].count("sequential") == 1
    for candidate in candidates:
        check_schedule(graph, Machine((GPU,), cap), candidate.schedule)
        assert candidate.stream_count <= cap
        assert candidate.predicted_us == simulate(graph, cost, candidate.schedule).makespan_us
    shapes = [str(shape(candidate.schedule)) for candidate in candidates]
    assert len(set(shapes)) == len(shapes)


@settings(deadline=None)
@given(problem=device_problems())
def test_over_several_devices_all_fit_and_those_on_one_come_first(
    problem: tuple[OperatorGraph, TableCost, Machine],
) -> None:
    graph, cost, machine = problem
    contraction = contract_chains(graph)
    candidates = propose(graph, contraction, cost, machine, tuple(POLICIES))
    for candidate in candidates:
        check_schedule(graph, machine, candidate.schedule)
        assert candidate.policy in SPREADING or len(candidate.schedule.devices) <= 1
    shapes = [candidate.contracted.shape for candidate in candidates]
    assert len(set(shapes)) == len(shapes)
    unlimited = replace(machine, memory_nbytes={})
    assert propose(graph, contraction, cost, unlimited, ())[0].policy == "sequential"
    alone = propose(graph, contraction, cost, replace(machine, devices=(GPU,)), tuple(POLICIES))
    assert candidates[: len(alone)] == alone
    if propose(graph, contraction, cost, machine.alone, ()):
        assert "sequential" in {candidate.policy for candidate in candidates}
    if any(candidate.policy == "sequential" for candidate in alone):
        on_one = {c.schedule.devices for c in candidates if c.policy not in SPREADING}
        assert on_one <= {(GPU,), ()}


def test_what_no_device_alone_can_hold_is_spread() -> None:
    graph, cost = graph_of(2, [(0, 1)]), durations(1.0, 1.0)
    weights = [(Weight("a", 1000),), (Weight("b", 1000),)]
    graph = replace(
        graph,
        operators=tuple(
            replace(o, weights=w) for o, w in zip(graph.operators, weights, strict=True)
        ),
    )
    identity = Contraction(graph, ((0,), (1,)))
    machine = Machine(DEVICES[:2], 2, dict.fromkeys(DEVICES, 1500))
    found = propose(graph, identity, cost, machine, tuple(POLICIES))
    assert found
    assert {candidate.schedule.devices for candidate in found} == {DEVICES[:2]}
    smaller = replace(machine, memory_nbytes=dict.fromkeys(DEVICES, 500))
    assert propose(graph, identity, cost, smaller, tuple(POLICIES)) == ()


def test_where_the_first_device_is_full_one_with_room_is_asked_for() -> None:
    shape, cost = layered_problem(3, 3, seed=1)
    weights = (Weight("w", 1000),)
    graph = replace(shape, operators=tuple(replace(o, weights=weights) for o in shape.operators))
    full, roomy = DEVICES[:2]
    machine = Machine((full, roomy), 4, {full: 500, roomy: 1 << 20})
    contraction = contract_chains(graph)
    found = propose(graph, contraction, cost, machine, tuple(POLICIES))
    alone = propose(graph, contraction, cost, machine.alone, tuple(POLICIES))
    assert found[: len(alone)] == alone
    assert alone[0].policy == "sequential"
    assert {candidate.schedule.devices for candidate in alone} == {(roomy,)}


def test_one_stream_leaves_only_orders_to_choose_from() -> None:
    assert {c.stream_count for c in proposed(layered_problem(6, 5, seed=1), 1)} == {1}


def test_every_stream_count_up_to_the_cap_is_tried() -> None:
    used = {c.stream_count for c in proposed(layered_problem(6, 12, seed=1), 7, ("wavefront",))}
    assert used == {1, *(count for count in STREAM_COUNTS if count < 7), 7}


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_is_asked_for_is_proposed_beside_sequential(policy: str) -> None:
    found = {c.policy for c in proposed(layered_problem(6, 5, seed=1), 4, (policy,))}
    assert found == {"sequential", policy}


def test_a_chain_has_one_schedule() -> None:
    chain = graph_of(4, [(0, 1), (1, 2), (2, 3)])
    (only,) = proposed((chain, durations(1.0, 2.0, 3.0, 4.0)), 8)
    assert (only.policy, only.stream_count, only.predicted_us) == ("sequential", 1, 10.0)


def test_the_diamond_overlaps_where_streams_allow() -> None:
    diamond = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    found = proposed((diamond, durations(1.0, 4.0, 2.0, 8.0)), 2, ("heft",))
    assert [(c.policy, c.stream_count, c.predicted_us) for c in found] == [
        ("sequential", 1, 15.0),
        ("heft", 2, 13.0),
    ]
