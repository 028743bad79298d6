"""One stream: what every other policy has to beat."""

from __future__ import annotations

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.schedule import Schedule, Slot


def sequential(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Launch every operator on the first stream, in the graph's order. O(n)."""
    placement = machine.placements[0]
    return Schedule(tuple(Slot(operator, placement) for operator in range(len(graph))))
