"""A link carries one tensor after another, and what reads a tensor waits for its turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched.cost import Contention, TableCost
from onnxsched.graph import Edge, OperatorGraph
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, simulate
from onnxsched_runtime.device import Device, Placement
from support.graphs import durations, graph_of, linear
from support.strategies import graphs

GPUS = [Device("cuda", index) for index in range(3)]
LINKED = Contention(link_share=1.0)


def timeline(graph: OperatorGraph, cost: TableCost, *streams: tuple[int, int]) -> Timeline:
    """Each operator on a device and a stream, in their order."""
    slots = [
        Slot(operator, Placement(GPUS[device], stream))
        for operator, (device, stream) in enumerate(streams)
    ]
    return simulate(graph, cost, Schedule(tuple(slots)))


def sending(*ends: tuple[int, int], nbytes: int = 100) -> OperatorGraph:
    """A graph of a tensor for each edge."""
    shape = graph_of(1 + max(map(max, ends)), ends)
    edges = tuple(replace(edge, nbytes=nbytes) for edge in shape.edges)
    return replace(shape, edges=edges)


def cost_of(graph: OperatorGraph, contention: Contention = LINKED) -> TableCost:
    """Operators of 1 us, and transfers of 5 us of which all but 1 us are for bytes."""
    costs = durations(*[1.0] * len(graph), unmeasured=linear(1.0, 25.0))
    return replace(costs, contention=contention)


def test_the_second_tensor_waits_for_the_first() -> None:
    graph = sending((0, 2), (1, 3))
    found = timeline(graph, cost_of(graph), (0, 0), (0, 1), (1, 0), (1, 1))
    assert found.starts_us == (0.0, 0.0, 6.0, 10.0)
    free = timeline(graph, cost_of(graph, Contention()), (0, 0), (0, 1), (1, 0), (1, 1))
    assert free.starts_us == (0.0, 0.0, 6.0, 6.0)


@pytest.mark.parametrize(
    "streams",
    [
        [(0, 0), (1, 0), (1, 1), (0, 1)],  # one there, one back
        [(0, 0), (2, 0), (1, 0), (1, 1)],  # from two devices
        [(0, 0), (0, 1), (1, 0), (2, 0)],  # to two devices
    ],
)
def test_other_links_are_free(streams: list[tuple[int, int]]) -> None:
    graph = sending((0, 2), (1, 3))
    assert timeline(graph, cost_of(graph), *streams).starts_us == (0.0, 0.0, 6.0, 6.0)


def test_a_tensor_crosses_once_whoever_reads_it() -> None:
    graph = OperatorGraph(graph_of(3, []).operators, (Edge(0, 1, "t", 100), Edge(0, 2, "t", 100)))
    found = timeline(graph, cost_of(graph), (0, 0), (1, 0), (1, 1))
    assert found.starts_us == (0.0, 6.0, 6.0)


def test_half_of_a_transfer_can_be_beside_another() -> None:
    graph = sending((0, 2), (1, 3))
    cost = cost_of(graph, Contention(link_share=0.5))
    found = timeline(graph, cost, (0, 0), (0, 1), (1, 0), (1, 1))
    assert found.starts_us == (0.0, 0.0, 6.0, 8.0)


def one_by_one(
    graph: OperatorGraph, cost: TableCost, where: list[Placement], found: Timeline
) -> Any:
    """When each operator could start, given when those before it finish: links in turn."""
    can_start = [0.0] * len(graph)
    free: dict[tuple[Device, Device], float] = {}
    last: dict[Placement, int] = {}
    for operator, placement in enumerate(where):
        if placement in last:
            can_start[operator] = found.finishes_us[last[placement]]
        last[placement] = operator
    for producer in sorted(
        range(len(graph)), key=lambda o: (found.finishes_us[o], found.starts_us[o], o)
    ):
        now = found.finishes_us[producer]
        tensors: dict[str, list[Edge]] = {}
        slowest: dict[int, float] = {}
        for edge in graph.outgoing[producer]:
            us = cost.transfer_us(edge.nbytes, where[producer].device, where[edge.consumer].device)
            slowest[edge.consumer] = max(slowest.get(edge.consumer, 0.0), us)
            tensors.setdefault(edge.tensor, []).append(edge)
        for edges in tensors.values():
            for target in dict.fromkeys(where[edge.consumer].device for edge in edges):
                link = (where[producer].device, target)
                start = max(now, free.get(link, 0.0))
                if link[0] != target:
                    free[link] = start + cost.transfer_us(edges[0].nbytes, *link)
                    free[link] -= cost.transfer_us(0, *link)
                for consumer in (e.consumer for e in edges if where[e.consumer].device == target):
                    turn = (start if link[0] != target else now) + slowest[consumer]
                    can_start[consumer] = max(can_start[consumer], turn)
    return pytest.approx(can_start)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), graph=graphs(10))
def test_starts_are_those_of_links_that_take_turns(data: DataObject, graph: OperatorGraph) -> None:
    some_us = st.sampled_from([0.5, 1.0, 2.0, 7.5])
    times = [data.draw(some_us) for _ in range(len(graph))]
    cost = replace(durations(*times, unmeasured=linear(1.5, 512.0)), contention=LINKED)
    places = st.builds(Placement, st.sampled_from(GPUS), st.integers(0, 1))
    where = [data.draw(places) for _ in range(len(graph))]
    schedule = Schedule(tuple(Slot(operator, place) for operator, place in enumerate(where)))
    found = simulate(graph, cost, schedule)
    assert found.starts_us == one_by_one(graph, cost, where, found)
    free = simulate(graph, replace(cost, contention=Contention()), schedule)
    assert all(a >= b for a, b in zip(found.starts_us, free.starts_us, strict=True))
