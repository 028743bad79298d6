"""Durations and upward ranks: what policies order operators by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched_runtime.device import Device


def durations_us(graph: OperatorGraph, cost: CostModel, device: Device) -> tuple[float, ...]:
    """The duration of each operator when it runs alone on `device`."""
    return tuple(cost.operator(operator, device).duration_us for operator in range(len(graph)))


def upward_ranks_us(graph: OperatorGraph, cost: CostModel, *devices: Device) -> tuple[float, ...]:
    """The longest way from the start of each operator to the end of the graph.

    rank(v) = duration(v) + max over edges (v, w) of transfer(v, w) + rank(w). With several devices
    durations are means over the devices and transfers means over the pairs of different devices,
    as in HEFT (Topcuoglu et al., IEEE TPDS 2002); on one device transfers are free.
    O(operators * devices + edges + different sizes * devices^2).
    """
    on_device = [durations_us(graph, cost, device) for device in devices]
    pairs = tuple(permutations(devices, 2))
    mean_us = {
        nbytes: _mean_transfer_us(nbytes, cost, pairs)
        for nbytes in {edge.nbytes for edge in graph.edges}
    }
    ranks_us = [0.0] * len(graph)
    for operator in reversed(range(len(graph))):
        tail_us = max(
            (mean_us[edge.nbytes] + ranks_us[edge.consumer] for edge in graph.outgoing[operator]),
            default=0.0,
        )
        ranks_us[operator] = sum(us[operator] for us in on_device) / len(devices) + tail_us
    return tuple(ranks_us)


def rank_order(ranks_us: Sequence[float]) -> list[int]:
    """Operators by decreasing upward rank, ties by index. O(n log n).

    The order is topological: no rank is below that of a successor, and where a duration of zero
    makes them equal the producer has the lower index.
    """
    return sorted(range(len(ranks_us)), key=lambda operator: (-ranks_us[operator], operator))


def _mean_transfer_us(
    nbytes: int, cost: CostModel, pairs: Sequence[tuple[Device, Device]]
) -> float:
    if not pairs:
        return 0.0
    total_us = sum(cost.transfer_us(nbytes, source, target) for source, target in pairs)
    return total_us / len(pairs)
