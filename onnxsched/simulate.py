"""Predict when each operator of a schedule runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxsched.cost import CostModel
from onnxsched.fluid import Tasks, run_tasks
from onnxsched.graph import Edge, OperatorGraph
from onnxsched.links import outputs_of, sends_between
from onnxsched.rank import durations_us, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched_runtime.device import Device


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
    reads have arrived, and `cost.contention` says what running beside others costs, and what
    waits for a link that another tensor is on. O(edges + n * (log n + operators that run at
    once)), and O(n + edges) without contention.
    """
    placement_of = schedule.placement_of
    placements = [placement_of[operator] for operator in range(len(graph))]
    tasks = tasks_on(graph, cost, [placement.device for placement in placements])
    order = [slot.operator for slot in schedule.slots]
    starts_us, finishes_us = run_tasks(tasks, cost.contention, order, placements)
    return Timeline(tuple(starts_us), tuple(finishes_us))


def tasks_on(graph: OperatorGraph, cost: CostModel, devices: Sequence[Device]) -> Tasks:
    """The operators as tasks, given the device of each. O(n + edges)."""
    costs = [cost.operator(operator, device) for operator, device in enumerate(devices)]
    number = {device: index for index, device in enumerate(dict.fromkeys(devices))}
    numbers = tuple(number[device] for device in devices)
    outputs = outputs_of(graph, cost, list(number))
    return Tasks(
        durations_us=tuple(operator.duration_us for operator in costs),
        sm_shares=tuple(operator.sm_share for operator in costs),
        devices=numbers,
        incoming=tuple(
            _arrivals(edges, cost, devices, device)
            for edges, device in zip(graph.incoming, devices, strict=True)
        ),
        ready_us=(0.0,) * len(graph),
        sends=sends_between(outputs, numbers, len(number)),
    )


def _arrivals(
    edges: Iterable[Edge], cost: CostModel, devices: Sequence[Device], device: Device
) -> tuple[tuple[int, float], ...]:
    """The producers of tensors, and how long the longest transfer from each to `device` takes."""
    delay_us: dict[int, float] = {}
    for edge in edges:
        transfer_us = cost.transfer_us(edge.nbytes, devices[edge.producer], device)
        delay_us[edge.producer] = max(delay_us.get(edge.producer, 0.0), transfer_us)
    return tuple(delay_us.items())


def critical_path_us(graph: OperatorGraph, cost: CostModel, device: Device) -> float:
    """The longest path: no schedule on copies of `device` is shorter. O(n + edges)."""
    return max(upward_ranks_us(graph, cost, device), default=0.0)


def total_us(graph: OperatorGraph, cost: CostModel, device: Device) -> float:
    """The sum of all durations: no schedule on one device is longer. O(n)."""
    return sum(durations_us(graph, cost, device))
