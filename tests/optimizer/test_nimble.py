"""Nimble's pieces against networkx and brute force."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched import reachability
from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.matching import maximum_matching
from onnxsched.policies.nimble import chain_links, nimble, reuse_links
from onnxsched.reachability import levels, reached_targets, transitive_reduction
from support import oracles
from support.graphs import durations, graph_of
from support.strategies import GPU, graphs, problems


@settings(deadline=None)
@given(graph=graphs(), data=st.data())
def test_reached_targets_equal_networkx(graph: OperatorGraph, data: st.DataObject) -> None:
    operators = st.integers(0, max(0, len(graph) - 1))
    targets = data.draw(st.lists(operators, unique=True)) if len(graph) else []
    first = data.draw(operators)
    mirror = oracles.digraph(graph)
    for operator, reached in enumerate(reached_targets(graph, targets, first)):
        if operator < first and operator not in targets:
            assert reached == 0
        elif operator >= first:
            found = {target for bit, target in enumerate(targets) if reached >> bit & 1}
            assert found == (nx.descendants(mirror, operator) | {operator}) & set(targets)


@settings(deadline=None)
@given(graph=graphs(), block_size=st.sampled_from([1, 3, 8192]))
def test_transitive_reduction_equals_networkx(graph: OperatorGraph, block_size: int) -> None:
    expected = nx.transitive_reduction(oracles.digraph(graph))
    with mock.patch.object(reachability, "_BLOCK_SIZE", block_size):
        reduction = transitive_reduction(graph)
    for operator in range(len(graph)):
        assert list(reduction[operator]) == sorted(expected.successors(operator))


@settings(deadline=None)
@given(graph=graphs())
def test_levels_equal_networkx(graph: OperatorGraph) -> None:
    generations = nx.topological_generations(oracles.digraph(graph))
    level_of = {v: level for level, members in enumerate(generations) for v in members}
    assert list(levels(graph)) == [level_of[operator] for operator in range(len(graph))]


@settings(deadline=None, max_examples=300)
@given(graph=graphs(), data=st.data())
def test_matching_is_valid_and_as_large_as_networkx_finds(
    graph: OperatorGraph, data: st.DataObject
) -> None:
    some = st.lists(st.sampled_from(range(len(graph))), unique=True) if len(graph) else st.just([])
    sources, sinks = data.draw(some), data.draw(some)
    matching = maximum_matching(graph.successors, sources, sinks)
    assert set(matching) <= set(sources)
    assert set(matching.values()) <= set(sinks)
    assert len(set(matching.values())) == len(matching)
    closure = nx.transitive_closure_dag(oracles.digraph(graph))
    assert all(closure.has_edge(*pair) for pair in matching.items())
    mirror: Any = nx.Graph()
    lefts = [("left", source) for source in sources]
    mirror.add_nodes_from(lefts)
    pairs = [pair for pair in closure.edges if pair[0] in sources and pair[1] in sinks]
    mirror.add_edges_from((("left", u), ("right", v)) for u, v in pairs)
    expected = nx.bipartite.hopcroft_karp_matching(mirror, lefts)
    assert 2 * len(matching) == len(expected)


def test_matching_follows_long_augmenting_paths_without_recursion() -> None:
    size = 3000
    links = [[size + index, size + index + 1] for index in range(size - 1)] + [[size]]
    links += [[] for _ in range(size)]
    assert len(maximum_matching(links, range(size), range(size, 2 * size))) == size


@settings(deadline=None)
@given(graph=graphs(max_operators=8))
def test_chains_are_as_few_as_brute_force_finds(graph: OperatorGraph) -> None:
    assert len(graph) - len(chain_links(graph)) == oracles.minimum_chain_count(graph)


@settings(deadline=None)
@given(graph=graphs())
def test_a_level_needs_as_many_streams_as_it_has_operators(graph: OperatorGraph) -> None:
    links = chain_links(graph)
    chain_count = len(graph) - len(links)
    widest = max(Counter(levels(graph)).values(), default=0)
    assert chain_count - len(reuse_links(graph, links)) >= widest


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
    assert chain_links(graph) == {0: 1, 1: 3, 3: 4, 4: 6}
    assert reuse_links(graph, chain_links(graph)) == {2: 5}
    schedule = nimble(graph, durations(*[1.0] * 7), Machine((GPU,), 7))
    assert schedule.stream_count == 2
