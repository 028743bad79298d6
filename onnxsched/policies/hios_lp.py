"""HIOS-LP: longest paths to devices one after another, then a sliding window on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxsched.cost import CostModel
from onnxsched.delays import Inputs, delays_between
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import durations_us, rank_order, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched.windows import WINDOW, hierarchical

PART_SIZE = 128
"""Operators whose paths are mapped together: all, in a graph of so many."""

UNMAPPED = -1


def hios_lp(
    graph: OperatorGraph, cost: CostModel, machine: Machine, *, window: int = WINDOW
) -> Schedule:
    """HIOS with mapping by longest paths, or one device where that is faster.

    Kundu & Shu, "HIOS: Hierarchical Inter-Operator Scheduler for Real-Time Inference of
    DAG-Structured Deep Learning Models on Multiple GPUs" (IEEE Cluster 2023): `map_paths` chooses
    devices, `hierarchical` streams. Never slower in simulation than one stream, where that fits.
    Time: that of both, O(n) but for sorting and the constants of each.

    Args:
        graph: The operators.
        cost: Their costs.
        machine: Devices and streams.
        window: Operators of a device among which those that start together are looked for.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    order = rank_order(upward_ranks_us(graph, cost, *machine.devices))
    number_of = map_paths(Queues.of(graph, cost, machine), order)
    devices = [machine.devices[number] for number in number_of]
    return hierarchical(graph, cost, machine, order, devices, window)


@dataclass(frozen=True)
class Queues:
    """What a queue on each device costs; devices are numbered as in the machine."""

    inputs: Sequence[Inputs]
    work_us: Sequence[Sequence[float]]
    """By device and operator."""
    event_us: float
    """Of a tensor from another device, beside its transfer."""

    @classmethod
    def of(cls, graph: OperatorGraph, cost: CostModel, machine: Machine) -> Queues:
        """The costs as tables. O((n + different sizes * devices) * devices + edges)."""
        own = cost.contention
        work_us = [
            [own.start_us + us * own.duration_factor for us in durations_us(graph, cost, device)]
            for device in machine.devices
        ]
        return cls(delays_between(graph, cost, machine.devices), work_us, own.event_us)

    def run(
        self,
        order: Sequence[int],
        number_of: Sequence[int],
        finish_us: list[float],
        free_us: Sequence[float],
    ) -> list[float]:
        """Run each operator of `order` that is mapped behind the one before it on its device.

        This is what `simulate` says of one stream a device, but goes on from any point, and leaves
        out operators that are not mapped yet. O(n + edges).

        Args:
            order: The operators, topological.
            number_of: The device of each by index, `UNMAPPED` where it has none.
            finish_us: When each operator of the graph finishes, filled in for those of `order`.
            free_us: From when each device is free.

        Returns:
            From when each device is free then.
        """
        now_us = list(free_us)
        for operator in order:
            number = number_of[operator]
            if number == UNMAPPED:
                continue
            start_us = now_us[number]
            for producer, delays in self.inputs[operator]:
                source = number_of[producer]
                if source == UNMAPPED:
                    continue
                arrival_us = finish_us[producer] + delays[source][number]
                if source != number:
                    arrival_us += self.event_us
                if arrival_us > start_us:
                    start_us = arrival_us
            finish_us[operator] = now_us[number] = start_us + self.work_us[number][operator]
        return now_us


def map_paths(queues: Queues, order: Sequence[int]) -> list[int]:
    """The number of each operator's device, one path after another.

    The longest path of operators that have no device yet, with transfers on it and those from and
    to operators that have one, goes as a whole to the device where all that is mapped finishes
    first (ties: the lowest). Then the longest of what remains, until nothing does. Large graphs
    are cut, in launch order, into parts of `PART_SIZE` that are mapped one after another: HIOS
    does so at operators that all paths go through, which most graphs have few of. Which path is
    the longest does not depend on transfers from other parts, with which schedules got no shorter;
    where it goes does. O(n * PART_SIZE * devices).

    Args:
        queues: What operators and transfers cost.
        order: A topological launch order.
    """
    if len(queues.work_us) == 1:
        return [0] * len(order)
    number_of = [UNMAPPED] * len(order)
    finish_us = [0.0] * len(order)
    device_count = len(queues.work_us)
    free_us = [0.0] * device_count
    for first in range(0, len(order), PART_SIZE):
        part = _Part.of(queues, order[first : first + PART_SIZE])
        while path := _longest_path(part, number_of):
            start = part.members.index(path[0])  # Whatever comes before it stays as it is.
            before, after = part.members[:start], part.members[start:]
            before_us = queues.run(before, number_of, finish_us, free_us)
            latency_us = []
            for number in range(device_count):
                for operator in path:
                    number_of[operator] = number
                latency_us.append(max(queues.run(after, number_of, finish_us, before_us)))
            for operator in path:
                number_of[operator] = latency_us.index(min(latency_us))
        free_us = queues.run(part.members, number_of, finish_us, free_us)
    return number_of


@dataclass(frozen=True)
class _Part:
    """Some operators, and the mean costs of running them and of the tensors between them."""

    members: Sequence[int]
    """In launch order."""
    work_us: dict[int, float]
    readers: dict[int, list[tuple[int, float]]]
    """Who of them reads from each operator, and how long a transfer there takes."""

    @classmethod
    def of(cls, queues: Queues, members: Sequence[int]) -> _Part:
        device_count = len(queues.work_us)
        pair_count = max(1, device_count * (device_count - 1))
        readers: dict[int, list[tuple[int, float]]] = {operator: [] for operator in members}
        for operator in members:
            for producer, delays in queues.inputs[operator]:
                if producer in readers:
                    readers[producer].append((operator, sum(map(sum, delays)) / pair_count))
        work_us = {v: sum(us[v] for us in queues.work_us) / device_count for v in members}
        return cls(members, work_us, readers)


def _longest_path(part: _Part, number_of: Sequence[int]) -> list[int]:
    """The longest path of unmapped operators, with transfers in the part; empty if none."""
    way_us: dict[int, float] = {}
    follower: dict[int, int] = {}
    longest_us, head = -1.0, UNMAPPED
    lead_us: dict[int, float] = {}
    for operator in part.members:
        if number_of[operator] != UNMAPPED:
            for reader, transfer_us in part.readers[operator]:
                lead_us[reader] = max(lead_us.get(reader, 0.0), transfer_us)
    for operator in reversed(part.members):
        if number_of[operator] != UNMAPPED:
            continue
        tail_us = 0.0
        for reader, transfer_us in part.readers[operator]:
            reader_us = transfer_us + way_us.get(reader, 0.0)
            if reader_us > tail_us:
                tail_us = reader_us
                follower[operator] = reader
        way_us[operator] = part.work_us[operator] + tail_us
        if way_us[operator] + lead_us.get(operator, 0.0) > longest_us:
            longest_us, head = way_us[operator] + lead_us.get(operator, 0.0), operator
    path: list[int] = []
    while head in way_us:
        path.append(head)
        head = follower.get(head, UNMAPPED)
    return path
