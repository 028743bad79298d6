"""Opara's two algorithms on examples worked by hand, and folding."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched import reachability, streams
from onnxsched.calibration import TYPICAL
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies.nimble import nimble
from onnxsched.policies.opara import launch_order, opara, path_cover
from onnxsched.simulate import simulate
from onnxsched.streams import fold_streams, schedule_chains
from support import oracles
from support.graphs import durations, graph_of
from support.strategies import GPU, contentions, machines, problems
from support.timing import at_most_cpu_s

INCEPTION = graph_of(8, [(0, 1), (0, 2), (0, 3), (2, 4), (1, 5), (4, 5), (3, 5), (5, 6), (5, 7)])
"""A fork of three branches, the second of two operators, a join, and a second fork."""


def costs(*rows: tuple[str, float]) -> list[OperatorCost]:
    """Costs from the first letter of the bound, and the block share."""
    return [
        OperatorCost(1.0, "compute" if bound == "c" else "memory", share) for bound, share in rows
    ]


def test_algorithm_1_hands_each_stream_on_once() -> None:
    links = path_cover(INCEPTION, range(8))
    assert links == {0: 1, 2: 4, 1: 5, 5: 6}
    schedule = schedule_chains(range(8), links, GPU)
    streams = [schedule.placement_of[operator].stream for operator in range(8)]
    assert streams == [0, 0, 1, 2, 1, 0, 0, 3]


def test_algorithm_1_joins_the_first_input_not_yet_handed_on() -> None:
    graph = graph_of(4, [(0, 2), (0, 3), (1, 3)])
    assert path_cover(graph, range(4)) == {0: 2, 1: 3}


def test_algorithm_2_starts_with_compute_and_alternates_by_block_share() -> None:
    ready = costs(("m", 0.5), ("c", 0.5), ("c", 0.1), ("m", 0.1), ("c", 0.3), ("c", 0.2))
    assert launch_order(graph_of(6, []), ready) == [2, 3, 5, 0, 4, 1]


def test_algorithm_2_breaks_ties_in_the_order_of_becoming_ready() -> None:
    graph = graph_of(5, [(0, 3)])
    assert launch_order(graph, costs(*[("c", 0.5)] * 5)) == [0, 1, 2, 4, 3]


def test_algorithm_2_turns_from_the_class_of_the_last_operator() -> None:
    graph = graph_of(3, [(0, 1), (0, 2)])
    assert launch_order(graph, costs(("m", 0.0), ("c", 0.9), ("m", 0.1))) == [0, 1, 2]


@settings(deadline=None)
@given(problem=problems())
def test_launch_order_is_topological(problem: tuple[OperatorGraph, TableCost]) -> None:
    graph, cost = problem
    assert oracles.is_topological(graph, launch_order(graph, cost.operators))


@settings(deadline=None)
@given(problem=problems())
def test_without_a_cap_operators_that_can_overlap_never_share_a_stream(
    problem: tuple[OperatorGraph, TableCost],
) -> None:
    graph, cost = problem
    schedule = opara(graph, cost, Machine((GPU,), max(1, len(graph))))
    independent = oracles.independent_pairs(graph)
    assert not independent & oracles.pairs_on_one_stream(schedule)


@settings(deadline=None)
@given(problem=problems(), machine=machines())
def test_folding_keeps_the_launch_order_and_every_chain(
    problem: tuple[OperatorGraph, TableCost], machine: Machine
) -> None:
    graph, cost = problem
    order = list(range(len(graph)))
    unfolded = schedule_chains(order, path_cover(graph, order), GPU)
    folded = fold_streams(graph, cost, unfolded, machine.stream_count)
    assert [slot.operator for slot in folded.slots] == order
    kept = oracles.pairs_on_one_stream(unfolded)
    assert kept <= oracles.pairs_on_one_stream(folded)
    assert folded.stream_count <= machine.stream_count


@settings(deadline=None)
@given(problem=problems(), machine=machines(), block_size=st.integers(1, 4))
def test_folding_looks_at_blocks_of_chains_as_at_all_together(
    problem: tuple[OperatorGraph, TableCost], machine: Machine, block_size: int
) -> None:
    graph, cost = problem
    alone = schedule_chains(range(len(graph)), {}, GPU)
    expected = fold_streams(graph, cost, alone, machine.stream_count)
    with mock.patch.object(reachability, "_BLOCK_SIZE", block_size):
        assert fold_streams(graph, cost, alone, machine.stream_count) == expected


def folded_streams(graph: OperatorGraph, cost: TableCost, stream_count: int) -> list[int]:
    """The streams of operators that were alone on theirs before folding."""
    alone = schedule_chains(range(len(graph)), {}, GPU)
    folded = fold_streams(graph, cost, alone, stream_count)
    return [slot.placement.stream for slot in folded.slots]


def test_folding_shares_the_stream_that_is_free_first() -> None:
    assert folded_streams(graph_of(3, []), durations(3.0, 1.0, 1.0), 2) == [0, 1, 1]


def test_folding_reuses_the_stream_that_is_free_last() -> None:
    joined = graph_of(3, [(0, 2), (1, 2)])
    assert folded_streams(joined, durations(1.0, 2.0, 1.0), 3) == [0, 1, 1]


@pytest.mark.parametrize("block_size", [1, 3, 8192])
def test_folding_does_not_take_a_shared_stream_for_a_finished_branch(block_size: int) -> None:
    graph, cost = graph_of(5, [(2, 3), (0, 4)]), durations(10.0, 12.0, 5.0, 1.0, 1.0)
    with mock.patch.object(reachability, "_BLOCK_SIZE", block_size):
        assert folded_streams(graph, cost, 2) == [0, 1, 0, 1, 1]


def test_folding_a_fan_takes_seconds_however_many_counts_are_tried() -> None:
    """All of it can run at once, which took seconds to simulate for each policy and count."""
    last = 7999
    spokes = [link for v in range(1, last) for link in ((0, v), (v, last))]
    graph = graph_of(last + 1, sorted(spokes, key=lambda link: link[1]))
    shares = [OperatorCost(1.0 + v / 100, sm_share=0.5) for v in range(len(graph))]
    cost = TableCost(tuple(shares), contention=TYPICAL)
    with at_most_cpu_s(10.0):
        for policy in (opara, nimble):
            for count in (2, 3, 4, 6, 8, 12, 16):
                assert policy(graph, cost, Machine((GPU,), count)).stream_count == count


@settings(deadline=None)
@given(problem=problems(), machine=machines(), contention=contentions())
def test_what_slows_chains_counts_unless_too_many_are_side_by_side(
    problem: tuple[OperatorGraph, TableCost], machine: Machine, contention: Contention
) -> None:
    graph, cost = problem
    cost = replace(cost, contention=contention)
    overheads = replace(contention, sm_slowdown=0.0, launch_slowdown=0.0)
    alone, count = schedule_chains(range(len(graph)), {}, GPU), machine.stream_count
    apart = fold_streams(graph, replace(cost, contention=overheads), alone, count)
    fewest = -len(graph) - 1  # Of nothing that takes time no pair is side by side.
    with mock.patch.object(streams, "_MOST_PAIRS", fewest):
        streams._unfolded.cache_clear()
        assert fold_streams(graph, cost, alone, count) == apart
    streams._unfolded.cache_clear()
    assert streams._unfolded(graph, cost.operators, contention, alone) == simulate(
        graph, cost, alone
    )
