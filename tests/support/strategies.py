"""Hypothesis strategies: graphs, costs and machines.

Durations, latency and bandwidth are sums of a few powers of two, so that times add up exactly and
tests can compare them with `==`.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched.machine import Machine
from onnxsched_runtime.device import Device

GPU = Device("cuda", 0)


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
    return st.builds(Contention, factor, overhead_us, overhead_us, slowdown, slowdown)


@st.composite
def problems(draw: DrawFn, max_operators: int = 14) -> tuple[OperatorGraph, TableCost]:
    """A graph and its costs."""
    graph = draw(graphs(max_operators))
    costs = draw(st.lists(operator_costs(), min_size=len(graph), max_size=len(graph)))
    return graph, TableCost(tuple(costs), latency_us=1.5, bandwidth_bytes_per_us=1024.0)


def machines(max_devices: int = 1) -> SearchStrategy[Machine]:
    """Machines of up to five streams a device."""
    devices = tuple(Device("cuda", index) for index in range(max_devices))
    return st.builds(
        Machine,
        devices=st.integers(1, max_devices).map(lambda count: devices[:count]),
        stream_count=st.integers(1, 5),
    )
