"""Hypothesis strategies: graphs, costs and machines.

Durations, latency and bandwidth are sums of a few powers of two, so that times add up exactly and
tests can compare them with `==`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, permutations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.transfer import TransferCurve
from onnxsched_runtime.device import Device
from support.graphs import linear

GPU = Device("cuda", 0)
DEVICES = tuple(Device("cuda", index) for index in range(8))


@st.composite
def graphs(draw: DrawFn, max_operators: int = 14) -> OperatorGraph:
    """Directed acyclic graphs, some operators on the host and some pairs with two tensors."""
    host_reasons = draw(
        st.lists(st.sampled_from([None, None, None, "host"]), max_size=max_operators)
    )
    operators = tuple(
        Operator(f"operator_{index}", "Op", reason) for index, reason in enumerate(host_reasons)
    )
    edges: list[Edge] = []
    for consumer in range(1, len(operators)):
        for producer in draw(st.lists(st.integers(0, consumer - 1), max_size=3)):
            nbytes = draw(st.sampled_from([0, 256, 4096]))
            edges.append(Edge(producer, consumer, f"tensor_{len(edges)}", nbytes))
    return OperatorGraph(operators, tuple(edges))


def operator_costs() -> SearchStrategy[OperatorCost]:
    """Costs with many zeros and ties."""
    return st.builds(
        OperatorCost,
        duration_us=st.sampled_from([0.0, 0.0, 0.25, 1.0, 1.0, 2.0, 7.5]),
        bound=st.sampled_from(["compute", "memory"]),
        block_share=st.sampled_from([0.0, 0.0, 0.25, 1.0]),
        sm_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    )


def contentions() -> SearchStrategy[Contention]:
    """Contention of every strength, none and the strongest allowed included."""
    overhead_us = st.sampled_from([0.0, 0.0, 0.25, 2.0])
    slowdown = st.sampled_from([0.0, 0.125, 0.5])
    factor = st.sampled_from([1.0, 1.0, 1.5])
    link = st.sampled_from([0.0, 0.5, 1.0])
    return st.builds(Contention, factor, overhead_us, overhead_us, slowdown, slowdown, link)


@st.composite
def problems(draw: DrawFn, max_operators: int = 14) -> tuple[OperatorGraph, TableCost]:
    """A graph and its costs."""
    graph = draw(graphs(max_operators))
    costs = draw(st.lists(operator_costs(), min_size=len(graph), max_size=len(graph)))
    return graph, TableCost(tuple(costs), unmeasured=linear(1.5, 1024.0))


def machines(max_devices: int = 1) -> SearchStrategy[Machine]:
    """Machines of up to five streams a device."""
    return st.builds(
        Machine,
        devices=st.integers(1, max_devices).map(lambda count: DEVICES[:count]),
        stream_count=st.integers(1, 5),
    )


def curves() -> SearchStrategy[TransferCurve]:
    """Curves from almost free to slower than any operator, of one to three points."""
    steps = st.tuples(st.sampled_from([1, 128, 4096]), st.sampled_from([0.0, 0.5, 4.0, 64.0]))
    return st.lists(steps, min_size=1, max_size=3).map(
        lambda steps: TransferCurve(
            tuple(zip(*(accumulate(column) for column in zip(*steps, strict=True)), strict=True)),
            is_peer=True,
        )
    )


@st.composite
def weighty_graphs(draw: DrawFn, max_operators: int = 10) -> OperatorGraph:
    """Graphs whose operators have weights, some shared, and tensors read by several of them."""
    shape = draw(graphs(max_operators))
    weights = [Weight(f"weight_{number}", 512 * number) for number in range(4)]
    nbytes = st.sampled_from([0, 256, 4096])
    operators = tuple(
        replace(
            operator,
            weights=tuple(draw(st.lists(st.sampled_from(weights), max_size=2, unique=True))),
            kept_nbytes=draw(nbytes),
            scratch_nbytes=draw(nbytes),
        )
        for operator in shape.operators
    )
    sizes = {edge.producer: edge.nbytes for edge in shape.edges}
    edges = {
        (edge.producer, edge.consumer): replace(
            edge, tensor=f"tensor_{edge.producer}", nbytes=sizes[edge.producer]
        )
        for edge in shape.edges
    }
    return OperatorGraph(operators, tuple(edges.values()))


@st.composite
def device_problems(draw: DrawFn) -> tuple[OperatorGraph, TableCost, Machine]:
    """A graph with weights, its costs, and up to eight devices, some with little memory."""
    graph = draw(weighty_graphs())
    machine = draw(machines(max_devices=8))
    pairs = draw(st.lists(st.sampled_from([*permutations(DEVICES, 2)]), max_size=4))
    costs = draw(st.lists(operator_costs(), min_size=len(graph), max_size=len(graph)))
    cost = TableCost(
        tuple(costs),
        contention=draw(contentions()),
        transfers={pair: draw(curves()) for pair in pairs},
        unmeasured=draw(curves()),
    )
    limited = draw(st.lists(st.sampled_from(machine.devices), max_size=8))
    limits = {device: draw(st.integers(0, 40)) * 512 for device in limited}
    return graph, cost, replace(machine, memory_nbytes=limits)
