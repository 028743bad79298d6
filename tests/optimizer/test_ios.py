"""IOS's stages: the best there are for small graphs, within their limits for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import Contention, TableCost, mean_share
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies.ios import ios
from onnxsched.simulate import simulate, total_us
from onnxsched.stages import ENDINGS_PER_GRAPH, PART_SIZE, Group, Stage, best_stages, stage_us
from support.graphs import durations, graph_of, layered_problem
from support.oracles import digraph
from support.plans import topological_orders
from support.strategies import GPU, contentions, machines, problems

Problem = tuple[OperatorGraph, TableCost]
NONE = Contention()


def sum_us(stages: list[Stage], contention: Contention = NONE) -> float:
    return sum(stage_us(stage, contention) for stage in stages)


def in_order(operators: Iterable[int], cost: TableCost) -> Group:
    """A group of these operators."""
    costs = [cost.operators[v] for v in sorted(operators)]
    share = mean_share((c.duration_us, c.sm_share) for c in costs)
    return Group(tuple(sorted(operators)), sum(c.duration_us for c in costs), share)


def least_sum_us(problem: Problem, group_size: int, group_count: int) -> float:
    """The smallest sum of all ways to cut a graph into stages, tried one by one. Exponential."""
    graph, cost = problem
    mirror = digraph(graph)

    @cache
    def least(remaining: frozenset[int]) -> float:
        sums = [
            least(remaining.difference(chosen))
            + stage_us([in_order(g, cost) for g in groups], cost.contention)
            for size in range(1, len(remaining) + 1)
            for chosen in combinations(sorted(remaining), size)
            if all(w in chosen for v in chosen for w in graph.successors[v] if w in remaining)
            for groups in [list(nx.weakly_connected_components(mirror.subgraph(chosen)))]
            if len(groups) <= group_count and max(map(len, groups)) <= group_size
        ]
        return min(sums, default=0.0)

    return least(frozenset(range(len(graph))))


def check_stages(problem: Problem, stages: list[Stage], group_size: int, group_count: int) -> None:
    """Every operator once and after what it reads, groups connected and apart, none too large."""
    graph, cost = problem
    mirror, done = digraph(graph), set[int]()
    for stage in stages:
        members = [operator for group in stage for operator in group.operators]
        assert not done.intersection(members)
        assert all(set(graph.predecessors[v]) <= done.union(members) for v in members)
        components = {
            frozenset(c) for c in nx.weakly_connected_components(mirror.subgraph(members))
        }
        assert components == {frozenset(group.operators) for group in stage}
        assert 1 <= len(stage) <= group_count
        assert all(len(group.operators) <= group_size for group in stage)
        assert [group.work_us for group in stage] == [
            pytest.approx(sum(cost.operators[v].duration_us for v in group.operators))
            for group in stage
        ]
        done.update(members)
    assert done == set(range(len(graph)))


@settings(deadline=None, max_examples=200)
@given(
    problem=problems(max_operators=7),
    group_size=st.integers(1, 7),
    group_count=st.integers(1, 7),
    contention=contentions(),
    shares=st.lists(st.floats(0, 1), min_size=7, max_size=7),
)
def test_no_stages_within_the_limits_are_faster(
    problem: Problem,
    group_size: int,
    group_count: int,
    contention: Contention,
    shares: list[float],
) -> None:
    graph, cost = problem
    operators = tuple(replace(o, sm_share=s) for o, s in zip(cost.operators, shares, strict=False))
    cost = TableCost(operators, contention=contention)
    stages = best_stages(graph, cost, GPU, group_size, group_count)
    check_stages((graph, cost), stages, group_size, group_count)
    least = least_sum_us((graph, cost), group_size, group_count)
    assert sum_us(stages, contention) == pytest.approx(least, rel=1e-9)


def test_groups_that_slow_each_other_down_fully_gain_nothing() -> None:
    graph = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    cost = durations(1.0, 4.0, 5.0, 1.0)
    assert sum_us(best_stages(graph, cost, GPU, 3, 8)) == 7.0
    slow = replace(cost, contention=Contention(launch_slowdown=1.0))
    stages = best_stages(graph, slow, GPU, 3, 8)
    assert sum_us(stages, slow.contention) == 11.0
    assert {len(stage) for stage in stages} == {1}


@settings(deadline=None)
@given(problem=problems(max_operators=7), data=st.data())
def test_the_best_sum_does_not_depend_on_how_operators_are_numbered(
    problem: Problem, data: st.DataObject
) -> None:
    graph, cost = problem
    order = data.draw(topological_orders(graph.predecessors))
    number = {operator: position for position, operator in enumerate(order)}
    renumbered = graph_of(
        len(graph), [(number[e.producer], number[e.consumer]) for e in graph.edges]
    )
    permuted = TableCost(tuple(cost.operators[operator] for operator in order))
    assert sum_us(best_stages(renumbered, permuted, GPU, 3, 8)) == sum_us(
        best_stages(graph, cost, GPU, 3, 8)
    )


@settings(deadline=None, max_examples=200)
@given(problem=problems(), machine=machines())
def test_the_schedule_is_no_longer_than_its_stages_with_barriers(
    problem: Problem, machine: Machine
) -> None:
    graph, cost = problem
    stages = best_stages(graph, cost, GPU, 3, min(8, machine.stream_count))
    schedule = ios(graph, cost, machine)
    assert simulate(graph, cost, schedule).makespan_us <= sum_us(stages)
    for stage in stages:
        streams = [{schedule.placement_of[v] for v in group.operators} for group in stage]
        assert all(len(of_group) == 1 for of_group in streams)
        assert len(set.union(*streams)) == len(stage)
    launched = [slot.operator for slot in schedule.slots]
    assert launched == [v for stage in stages for group in stage for v in group.operators]


@pytest.mark.parametrize(
    "problem",
    [
        layered_problem(layer_count=12, width=12, seed=0),
        (graph_of(64, []), durations(*range(64))),
        (graph_of(65, [(v, 64) for v in range(64)]), durations(*range(65))),
        (graph_of(90, [(v - d, v) for v in range(9, 90) for d in (1, 9)]), durations(*range(90))),
    ],
    ids=["layers", "nothing but sources", "fork", "no cut"],
)
def test_a_search_that_is_cut_short_ends_in_time_with_right_stages(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, cost = problem
    seen = 0

    def counted(groups: Sequence[Group], contention: Contention) -> float:
        nonlocal seen
        seen += 1
        return stage_us(groups, contention)

    monkeypatch.setattr("onnxsched.stages.stage_us", counted)
    stages = best_stages(graph, cost, GPU, 3, 8)
    halvings, sizes = PART_SIZE.bit_length(), 3
    assert len(graph) < seen <= halvings * sizes * ENDINGS_PER_GRAPH
    check_stages(problem, stages, 3, 8)
    assert sum_us(stages) < total_us(graph, cost, GPU)


def test_long_chains_and_forks_are_searched_block_by_block() -> None:
    """A thousand blocks of five branches of unequal length: far too many states as a whole."""
    blocks, links, work_us = 1000, [], [1.0]
    for _ in range(blocks):
        fork = len(work_us) - 1
        work_us += [2.0, 3.0, 4.0, 5.0, 1.0, 1.0]
        links += [(fork, fork + n) for n in (1, 2, 3, 4)] + [(fork + 1, fork + 5)]
        links += [(fork + n, fork + 6) for n in (2, 3, 4, 5)]
    graph, cost = graph_of(len(work_us), links), durations(*work_us)
    stages = best_stages(graph, cost, GPU, 3, 8)
    assert sum_us(stages) == 1.0 + blocks * (5.0 + 1.0)


def test_a_group_goes_on_where_its_last_input_was_made() -> None:
    graph = graph_of(4, [(1, 2), (0, 2), (1, 3)])
    cost = durations(5.0, 5.0, 2.0, 1.0)
    schedule = ios(graph, cost, Machine((GPU,), 4))
    assert [schedule.placement_of[operator].stream for operator in range(4)] == [0, 1, 1, 0]
