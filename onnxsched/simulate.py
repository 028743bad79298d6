"""Predict when each operator of a schedule runs."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.rank import durations_us, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched_runtime.device import Device, Placement


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each operator starts and finishes, by operator index; time 0 is the launch."""

    starts_us: tuple[float, ...]
    finishes_us: tuple[float, ...]

    @property
    def makespan_us(self) -> float:
        """When the last operator finishes; 0 without operators."""
        return max(self.finishes_us, default=0.0)


def simulate(graph: OperatorGraph, cost: CostModel, schedule: Schedule) -> Timeline:
    """Run a schedule that passes `check_schedule` on the cost model.

    An operator starts as soon as the one before it on its stream has finished and all tensors it
    reads have arrived. Operators on different streams do not slow each other. O(n + edges).
    """
    starts_us = [0.0] * len(graph)
    finishes_us = [0.0] * len(graph)
    free_us: dict[Placement, float] = {}
    for slot in schedule.slots:
        device = slot.placement.device
        start_us = free_us.get(slot.placement, 0.0)
        for edge in graph.incoming[slot.operator]:
            source = schedule.placement_of[edge.producer].device
            transfer_us = cost.transfer_us(edge.nbytes, source, device)
            start_us = max(start_us, finishes_us[edge.producer] + transfer_us)
        finish_us = start_us + cost.operator(slot.operator, device).duration_us
        starts_us[slot.operator] = start_us
        finishes_us[slot.operator] = free_us[slot.placement] = finish_us
    return Timeline(tuple(starts_us), tuple(finishes_us))


def critical_path_us(graph: OperatorGraph, cost: CostModel, device: Device) -> float:
    """The longest path: no schedule on copies of `device` is shorter. O(n + edges)."""
    return max(upward_ranks_us(graph, cost, device), default=0.0)


def total_us(graph: OperatorGraph, cost: CostModel, device: Device) -> float:
    """The sum of all durations: no schedule on one device is longer. O(n)."""
    return sum(durations_us(graph, cost, device))
