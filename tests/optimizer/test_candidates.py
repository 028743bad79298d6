"""What the policies propose, before anything is measured."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.candidates import STREAM_COUNTS, Candidate, propose
from onnxsched.contraction import contract_chains
from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Placement
from support.graphs import durations, graph_of, layered_problem
from support.strategies import GPU, problems

Problem = tuple[OperatorGraph, TableCost]


def proposed(
    problem: Problem, cap: int, policies: tuple[str, ...] = tuple(POLICIES)
) -> tuple[Candidate, ...]:
    graph, cost = problem
    return propose(graph, contract_chains(graph), cost, GPU, policies, cap)


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
    assert (only.label, only.predicted_us) == ("sequential/1", 10.0)


def test_the_diamond_overlaps_where_streams_allow() -> None:
    diamond = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    found = proposed((diamond, durations(1.0, 4.0, 2.0, 8.0)), 2, ("heft",))
    assert [(c.label, c.predicted_us) for c in found] == [("sequential/1", 15.0), ("heft/2", 13.0)]
