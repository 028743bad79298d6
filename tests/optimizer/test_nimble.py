"""Nimble's pieces against networkx and brute force."""

from __future__ import annotations

from typing import Any

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.matching import maximum_matching
from onnxsched.policies.nimble import nimble, reuse_links
from onnxsched.reachability import descendants, transitive_reduction
from support import oracles
from support.graphs import durations, graph_of
from support.strategies import GPU, graphs, problems


def members(bits: int) -> set[int]:
    return {index for index in range(bits.bit_length()) if bits >> index & 1}


@settings(deadline=None)
@given(graph=graphs())
def test_reachability_equals_networkx(graph: OperatorGraph) -> None:
    mirror = oracles.digraph(graph)
    reach = descendants(graph)
    reduction = transitive_reduction(graph, reach)
    expected = nx.transitive_reduction(mirror)
    for operator in range(len(graph)):
        assert members(reach[operator]) == nx.descendants(mirror, operator)
        assert members(reduction[operator]) == set(expected.successors(operator))


@settings(deadline=None, max_examples=200)
@given(adjacency=st.lists(st.integers(0, 2**12 - 1), max_size=12))
def test_matching_is_valid_and_as_large_as_networkx_finds(adjacency: list[int]) -> None:
    matching = maximum_matching(adjacency)
    assert len(set(matching.values())) == len(matching)
    assert all(adjacency[left] >> right & 1 for left, right in matching.items())
    mirror: Any = nx.Graph()
    lefts = [("left", left) for left in range(len(adjacency))]
    mirror.add_nodes_from(lefts)
    for left, rights in zip(lefts, adjacency, strict=True):
        mirror.add_edges_from((left, ("right", right)) for right in members(rights))
    expected = nx.bipartite.hopcroft_karp_matching(mirror, lefts)
    assert 2 * len(matching) == len(expected)


def test_matching_follows_long_augmenting_paths_without_recursion() -> None:
    size = 3000
    adjacency = [0b11 << index for index in range(size - 1)] + [1]
    assert len(maximum_matching(adjacency)) == size


@settings(deadline=None)
@given(graph=graphs(max_operators=8))
def test_chains_are_as_few_as_brute_force_finds(graph: OperatorGraph) -> None:
    links = maximum_matching(transitive_reduction(graph, descendants(graph)))
    assert len(graph) - len(links) == oracles.minimum_chain_count(graph)


@settings(deadline=None)
@given(problem=problems())
def test_operators_that_can_overlap_never_share_a_stream(
    problem: tuple[OperatorGraph, TableCost],
) -> None:
    graph, cost = problem
    schedule = nimble(graph, cost, Machine((GPU,), max(1, len(graph))))
    independent = oracles.independent_pairs(graph)
    assert not independent & oracles.pairs_on_one_stream(schedule)


def test_a_chain_reuses_the_stream_of_one_that_has_ended() -> None:
    graph = graph_of(7, [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (3, 5), (4, 6), (5, 6)])
    reach = descendants(graph)
    chain_links = maximum_matching(transitive_reduction(graph, reach))
    assert chain_links == {0: 1, 1: 3, 3: 4, 4: 6}
    assert reuse_links(reach, chain_links) == {2: 5}
    schedule = nimble(graph, durations(*[1.0] * 7), Machine((GPU,), 7))
    assert schedule.stream_count == 2
