"""Rammer's wavefronts: level by level."""

from __future__ import annotations

from heapq import heapreplace

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import durations_us
from onnxsched.reachability import levels
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.device import Placement


def wavefront(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Spread each breadth-first level over the streams of the first device.

    The wavefront order of Rammer (Ma et al., OSDI 2020). A level holds the operators whose longest
    path from a source has the same number of edges; they are independent, so each level is spread
    longest first, always onto the stream with the least work of this level (ties: the lowest).
    There is no barrier between levels, only launch order. O(n log n + edges).
    """
    device = machine.devices[0]
    duration_us = durations_us(graph, cost, device)
    slots: list[Slot] = []
    for level in _levels(graph):
        loads = [(0.0, stream) for stream in range(min(machine.stream_count, len(level)))]
        for operator in sorted(level, key=lambda v: (-duration_us[v], v)):
            load_us, stream = loads[0]
            heapreplace(loads, (load_us + duration_us[operator], stream))
            slots.append(Slot(operator, Placement(device, stream)))
    return Schedule(tuple(slots))


def _levels(graph: OperatorGraph) -> list[list[int]]:
    level_of = levels(graph)
    members: list[list[int]] = [[] for _ in range(max(level_of, default=-1) + 1)]
    for operator, level in enumerate(level_of):
        members[level].append(operator)
    return members
