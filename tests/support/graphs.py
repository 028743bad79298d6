"""Graphs for examples worked by hand, and large ones."""

from __future__ import annotations

import random
from collections.abc import Iterable

from onnxsched.cost import OperatorCost, TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched.transfer import TransferCurve


def graph_of(operator_count: int, links: Iterable[tuple[int, int]]) -> OperatorGraph:
    """A graph given by its links, each a tensor of one byte."""
    return OperatorGraph(
        tuple(Operator(f"operator_{index}", "Op") for index in range(operator_count)),
        tuple(Edge(u, v, f"tensor_{u}_{v}", 1) for u, v in links),
    )


def durations(*durations_us: float, unmeasured: TransferCurve | None = None) -> TableCost:
    """Costs of which only the durations matter, and transfers if given."""
    costs = tuple(OperatorCost(us) for us in durations_us)
    return TableCost(costs, unmeasured=unmeasured or linear(10.0, 1024.0))


def linear(latency_us: float, bytes_per_us: float) -> TransferCurve:
    """A curve for up to 64 KiB: bytes over bandwidth, after a latency."""
    largest = 1 << 16
    points = ((0, latency_us), (largest, latency_us + largest / bytes_per_us))
    return TransferCurve(points, is_peer=True)


def layered_problem(layer_count: int, width: int, seed: int) -> tuple[OperatorGraph, TableCost]:
    """Layers in which each operator reads from up to three of the layer before."""
    rng = random.Random(seed)
    links = [
        (producer, layer * width + column)
        for layer in range(1, layer_count)
        for column in range(width)
        for producer in sorted(
            {(layer - 1) * width + rng.randrange(width) for _ in range(rng.randint(1, 3))}
        )
    ]
    costs = tuple(
        OperatorCost(rng.uniform(1.0, 50.0), rng.choice(["compute", "memory"]), rng.random())
        for _ in range(layer_count * width)
    )
    return graph_of(layer_count * width, links), TableCost(costs)
