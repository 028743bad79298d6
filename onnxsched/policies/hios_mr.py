"""HIOS-MR: mappings recorded operator by operator, then a sliding window on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxsched.cost import CostModel
from onnxsched.delays import Delays, delays_between
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import durations_us, rank_order, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched.windows import WINDOW, hierarchical


def hios_mr(
    graph: OperatorGraph, cost: CostModel, machine: Machine, *, window: int = WINDOW
) -> Schedule:
    """HIOS with mapping by recorded mappings, or one device where that is faster.

    The second algorithm of Kundu & Shu, "HIOS" (IEEE Cluster 2023), as its code has it:
    `record_mappings` chooses devices, `hierarchical` streams. Never slower in simulation than one
    stream, where that fits. Time: that of both.

    Args:
        graph: The operators.
        cost: Their costs.
        machine: Devices and streams.
        window: Operators of a device among which those that start together are looked for.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    order = rank_order(upward_ranks_us(graph, cost, *machine.devices))
    number_of = record_mappings(graph, cost, machine, order)
    devices = [machine.devices[number] for number in number_of]
    return hierarchical(graph, cost, machine, order, devices, window)


@dataclass(frozen=True, slots=True)
class _Record:
    """One mapping of the operators so far."""

    free_us: list[float]
    """From when each device is free."""
    finish_us: list[float]
    """When each operator finishes that is still read from, by its place."""
    number_of: list[int]
    """The device of each, by its place."""


def record_mappings(
    graph: OperatorGraph, cost: CostModel, machine: Machine, order: Sequence[int]
) -> list[int]:
    """The number of each operator's device, by a table over operators and devices.

    In launch order each operator is tried on every device behind each of the mappings recorded for
    the operator before it, one for each device that could be on; for each device the mapping where
    the operator finishes first is kept (ties: where all finish first). The mapping that ends first
    is followed back. HIOS's code takes the minimum over mappings for each predecessor, and in
    effect looks at the first only; here all tensors of one mapping have to arrive. O((n * devices
    + edges) * devices), and n * devices copies of the operators that are still to be read from.
    """
    if len(machine.devices) == 1:
        return [0] * len(order)
    inputs = delays_between(graph, cost, machine.devices)
    place_of = _places(graph, order)
    width = 1 + max(place_of, default=0)
    device_count = len(machine.devices)
    own = cost.contention
    work_us = [
        [own.start_us + us * own.duration_factor for us in durations_us(graph, cost, device)]
        for device in machine.devices
    ]
    records = [_Record([0.0] * device_count, [0.0] * width, [0] * width)]
    came_from: list[list[int]] = []
    for operator in order:
        places = [(place_of[producer], delays) for producer, delays in inputs[operator]]
        chosen = []
        for number in range(device_count):
            finishes_us = [
                _start_us(record, places, number, own.event_us) + work_us[number][operator]
                for record in records
            ]
            finish_us = min(finishes_us)
            ties = [r for r, us in enumerate(finishes_us) if us == finish_us]
            chosen.append((finish_us, min(ties, key=lambda r: max(records[r].free_us))))
        came_from.append([before for _, before in chosen])
        records = [
            _extended(records[before], place_of[operator], number, finish_us)
            for number, (finish_us, before) in enumerate(chosen)
        ]
    ends_us = [max(record.free_us) for record in records]
    number = ends_us.index(min(ends_us))
    number_of = [0] * len(order)
    for operator, before in zip(reversed(order), reversed(came_from), strict=True):
        number_of[operator] = number
        number = before[number]
    return number_of


def _start_us(
    record: _Record, places: Sequence[tuple[int, Delays]], number: int, event_us: float
) -> float:
    """When an operator can start on a device, given the places of what it reads from."""
    start_us = record.free_us[number]
    for place, delays in places:
        source = record.number_of[place]
        arrival_us = record.finish_us[place] + delays[source][number]
        if source != number:
            arrival_us += event_us
        if arrival_us > start_us:
            start_us = arrival_us
    return start_us


def _extended(record: _Record, place: int, number: int, finish_us: float) -> _Record:
    """A mapping with one operator more."""
    longer = _Record(record.free_us.copy(), record.finish_us.copy(), record.number_of.copy())
    longer.free_us[number] = longer.finish_us[place] = finish_us
    longer.number_of[place] = number
    return longer


def _places(graph: OperatorGraph, order: Sequence[int]) -> list[int]:
    """A place for each operator, used again once all that read from it are mapped."""
    place_of = [0] * len(graph)
    unread = [len(successors) for successors in graph.successors]
    free: list[int] = []
    count = 0
    for operator in order:
        if not free:
            free.append(count)
            count += 1
        place_of[operator] = free.pop()
        done = [operator] if not unread[operator] else []
        for producer in graph.predecessors[operator]:
            unread[producer] -= 1
            if not unread[producer]:
                done.append(producer)
        free += [place_of[v] for v in done]
    return place_of
