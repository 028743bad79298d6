"""The families of synthetic graphs have the shapes that they are named after."""

from __future__ import annotations

import math
from collections import Counter

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.reachability import levels
from support import oracles
from tools.synthetic_graphs import FAMILIES, synthetic_problem

COUNTS = st.integers(0, 400)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=50)
@given(operator_count=COUNTS, seed=SEEDS)
def test_problems_are_as_large_as_asked_for_and_the_same_again(
    family: str, operator_count: int, seed: int
) -> None:
    graph, cost = problem = synthetic_problem(family, operator_count, seed)
    assert len(graph) == len(cost.operators) == operator_count
    assert problem == synthetic_problem(family, operator_count, seed)
    assert len({(edge.producer, edge.consumer) for edge in graph.edges}) == len(graph.edges)
    assert all(2**8 <= edge.nbytes <= 2**22 for edge in graph.edges)
    assert all(operator.duration_us > 0 for operator in cost.operators)
    if operator_count > 100:
        assert problem != synthetic_problem(family, operator_count, seed + 1)


@settings(deadline=None, max_examples=50)
@given(operator_count=COUNTS, seed=SEEDS)
def test_layered_graphs_are_square_and_join_neighbouring_layers(
    operator_count: int, seed: int
) -> None:
    graph, _ = synthetic_problem("layered", operator_count, seed)
    width = max(1, math.isqrt(operator_count))
    assert list(levels(graph)) == [operator // width for operator in range(operator_count)]
    assert all(1 <= len(read) <= 3 for read in graph.predecessors[width:])


@settings(deadline=None, max_examples=50)
@given(operator_count=st.integers(1, 400), seed=SEEDS)
def test_series_parallel_graphs_reduce_to_one_edge(operator_count: int, seed: int) -> None:
    graph, _ = synthetic_problem("series-parallel", operator_count, seed)
    mirror = oracles.digraph(graph)
    nx.add_path(mirror, ["in", 0])
    nx.add_path(mirror, [operator_count - 1, "out"])
    # A DiGraph merges parallel edges by itself, so only series are left to be taken out.
    pending = list(range(operator_count))
    while pending:
        operator = pending.pop()
        if operator in mirror and mirror.in_degree(operator) == mirror.out_degree(operator) == 1:
            ends = [*mirror.predecessors(operator), *mirror.successors(operator)]
            mirror.remove_node(operator)
            mirror.add_edge(*ends)
            pending += [end for end in ends if end not in ("in", "out")]
    assert set(mirror.edges) == {("in", "out")}


@settings(deadline=None, max_examples=50)
@given(operator_count=st.integers(200, 800), seed=SEEDS)
def test_nasnet_like_graphs_are_narrow_deep_and_local(operator_count: int, seed: int) -> None:
    graph, _ = synthetic_problem("nasnet", operator_count, seed)
    largest_cell = 5 * (2 * 4 + 1) + 1
    assert max(edge.consumer - edge.producer for edge in graph.edges) < 3 * largest_cell
    assert all(len(read) in (1, 2, 5) for read in graph.predecessors[1:])
    per_level = Counter(levels(graph))
    assert max(per_level.values()) <= 4 * 10
    assert len(per_level) >= operator_count / largest_cell


@settings(deadline=None, max_examples=50)
@given(operator_count=st.integers(200, 800), seed=SEEDS)
def test_random_graphs_are_shallow(operator_count: int, seed: int) -> None:
    graph, _ = synthetic_problem("random", operator_count, seed)
    assert all(1 <= len(read) <= 3 for read in graph.predecessors[1:])
    assert max(levels(graph)) < 12 * math.log(operator_count)
