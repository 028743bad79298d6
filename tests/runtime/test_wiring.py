"""A wired graph orders exactly what the streams and events of a plan order."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.lanes import lane_tensors, lanes_of
from onnxsched_runtime.partition import assemble, readers_of, segment_of
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.wiring import ChainNode, Point, WiredNode, wire
from support.plans import Problem, happens_before, problems

Chain = tuple[ChainNode, ...]


def one_each(problem: Problem) -> ExecutionPlan:
    """A plan with a segment for every operation, so that a stream has many runs."""
    readers = readers_of(problem.operations, problem.outputs)
    segments = [segment_of([o], readers) for o in problem.operations]
    return assemble(segments, problem.inputs, problem.outputs)


def chain_of(work: list[list[bool]]) -> tuple[Chain, list[list[int]]]:
    """A chain of segments with these nodes, marks between; and the indices of each one's work."""
    nodes: list[ChainNode] = []
    own: list[list[int]] = []

    def add(mark: int | None, is_work: bool) -> None:
        nodes.append(ChainNode((len(nodes) - 1,) if nodes else (), mark, is_work))

    for number, segment in enumerate(work):
        if number:
            add(number, False)
        own.append([])
        for is_work in segment:
            if is_work:
                own[-1].append(len(nodes))
            add(None, is_work)
    return tuple(nodes), own


def ancestors(wired: tuple[WiredNode, ...]) -> list[set[int]]:
    found: list[set[int]] = []
    for node in wired:
        assert all(earlier < len(found) for earlier in node.predecessors)
        found.append(set(node.predecessors).union(*(found[p] for p in node.predecessors)))
    return found


@settings(deadline=None, max_examples=300)
@given(data=st.data(), problem=problems(max_operations=12, streams=4))
def test_a_graph_orders_what_a_plan_orders_and_nothing_else(
    data: DataObject, problem: Problem
) -> None:
    plan = one_each(problem) if data.draw(st.booleans()) else problem.plan()
    order = happens_before(plan)
    for piece in (piece for piece in plan.pieces if piece.captured):
        lanes = lanes_of(plan, piece)
        some = st.lists(st.booleans(), max_size=3)
        chains: list[Chain] = []
        own: dict[int, list[tuple[int, int]]] = {}
        for number, lane in enumerate(lanes.lanes):
            chain, work = chain_of([data.draw(some) for _ in lane.segments])
            chains.append(chain)
            for index, nodes in zip(lane.segments, work, strict=True):
                own[index] = [(number, node) for node in nodes]
        wired = wire(chains, lanes.positions, lanes.waits)
        place = {(node.chain, node.index): i for i, node in enumerate(wired)}
        assert sorted(place) == sorted(node for nodes in own.values() for node in nodes)
        known = ancestors(wired)
        for node in wired:
            implied = set().union(*(known[p] for p in node.predecessors))
            assert implied.isdisjoint(node.predecessors)
        for a, b in product(own, own):
            if a != b:
                for first, second in product(own[a], own[b]):
                    assert (place[first] in known[place[second]]) == ((a, b) in order)
        for pairs in own.values():
            for earlier, later in pairwise(pairs):
                assert place[earlier] in known[place[later]]


@settings(deadline=None)
@given(problem=problems(max_operations=12, streams=4))
def test_lanes_hold_every_segment_and_name_what_flows_between_them(problem: Problem) -> None:
    plan = one_each(problem)
    captured = [piece for piece in plan.pieces if piece.captured]
    lanes = [lane for piece in captured for lane in lanes_of(plan, piece).lanes]
    held = sorted(index for lane in lanes for index in lane.segments)
    assert held == sorted(index for piece in captured for index in piece.runs)
    for lane in lanes:
        inner = {t for i in lane.segments for t in plan.segments[i].outputs}
        outer = {
            t for i, s in enumerate(plan.segments) if i not in lane.segments for t in s.inputs
        } | set(plan.outputs)
        assert not inner.intersection(lane.inputs)
        assert inner & outer <= set(lane.outputs) <= inner
        read = {t for i in lane.segments for t in plan.segments[i].inputs}
        assert set(lane.inputs) == read - inner
    homes = lane_tensors(plan, lanes)
    assert homes == {tensor: plan.device_of[tensor] for tensor in homes}
    assert homes.keys() == {t for lane in lanes for t in (*lane.inputs, *lane.outputs)}


def test_nodes_come_in_launch_order() -> None:
    a, _ = chain_of([[True], [True]])
    b, _ = chain_of([[True], [True]])
    wired = wire([a, b], [(0, 3), (1, 2)], [])
    assert [(node.chain, node.index) for node in wired] == [(0, 0), (1, 0), (1, 2), (0, 2)]


def test_a_wait_reaches_through_a_segment_that_does_no_work() -> None:
    chains = [chain_of([[True]])[0], chain_of([[]])[0], chain_of([[True]])[0]]
    waits = [(Point(0, 1), Point(1, 0)), (Point(1, 1), Point(2, 0))]
    assert wire(chains, [(0,), (1,), (2,)], waits)[1].predecessors == (0,)


def test_a_record_does_not_wait_for_what_its_stream_waits_for_next() -> None:
    chains = [chain_of([[True]])[0], chain_of([[True], [True]])[0], chain_of([[True]])[0]]
    waits = [(Point(0, 1), Point(1, 1)), (Point(1, 1), Point(2, 0))]
    wired = wire(chains, [(0,), (1, 2), (3,)], waits)
    (last,) = [node for node in wired if node.chain == 2]
    assert [wired[p].chain for p in last.predecessors] == [1]


def test_a_missing_mark_is_noticed() -> None:
    chain, _ = chain_of([[True]])
    with pytest.raises(PlanError, match=r"2 segments was captured with marks \[\]"):
        wire([chain], [(0, 1)], [])


def test_a_circle_is_noticed() -> None:
    chains = [chain_of([[True]])[0], chain_of([[True]])[0]]
    waits = [(Point(0, 1), Point(1, 0)), (Point(1, 1), Point(0, 0))]
    with pytest.raises(PlanError, match="circle"):
        wire(chains, [(0,), (1,)], waits)
