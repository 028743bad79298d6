"""A schedule: for each operator its device, stream and launch position."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property

from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import RoomError, ScheduleError


@dataclass(frozen=True, slots=True)
class Slot:
    """One operator on one stream."""

    operator: int
    """Index into `OperatorGraph.operators`."""
    placement: Placement


@dataclass(frozen=True)
class Schedule:
    """Every operator once, in launch order.

    Operators of one stream run one after another in this order; operators of different streams
    are ordered only by the tensors between them.
    """

    slots: tuple[Slot, ...]

    @cached_property
    def placement_of(self) -> dict[int, Placement]:
        """The placement of each operator."""
        return {slot.operator: slot.placement for slot in self.slots}

    @cached_property
    def shape(self) -> bytes:
        """Equal for schedules that differ only in how streams and devices are numbered."""
        number: dict[Placement, int] = {}
        device_number: dict[Device, int] = {}
        shape = array("q")
        for slot in self.slots:
            device = slot.placement.device
            shape.append(slot.operator)
            shape.append(number.setdefault(slot.placement, len(number)))
            shape.append(device_number.setdefault(device, len(device_number)))
        return shape.tobytes()

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices it uses, in order."""
        return tuple(sorted({slot.placement.device for slot in self.slots}))

    @property
    def stream_count(self) -> int:
        """How many different streams are used, over all devices."""
        return len({slot.placement for slot in self.slots})


def check_schedule(graph: OperatorGraph, machine: Machine, schedule: Schedule) -> None:
    """Check that a schedule can be executed as it stands.

    The laws: every operator once; on a stream the machine has; launched after everything it
    reads from; and no device has to hold more than its memory. O(operators + edges).

    Raises:
        RoomError: Only the last law is broken; names the device that is too full.
        ScheduleError: Names the first operator that breaks another.
    """
    names = [operator.name for operator in graph.operators]
    allowed = set(machine.placements)
    seen: set[int] = set()
    for position, slot in enumerate(schedule.slots):
        if not 0 <= slot.operator < len(graph):
            raise ScheduleError(f"Slot {position} holds operator {slot.operator}, not in graph.")
        name = names[slot.operator]
        if slot.operator in seen:
            raise ScheduleError(f"Operator '{name}' is launched twice, again at {position}.")
        if slot.placement not in allowed:
            raise ScheduleError(f"Operator '{name}' is on {slot.placement}, not in {machine}.")
        for producer in graph.predecessors[slot.operator]:
            if producer not in seen:
                raise ScheduleError(
                    f"Operator '{name}' is launched before '{names[producer]}' that it reads."
                )
        seen.add(slot.operator)
    for index, name in enumerate(names):
        if index not in seen:
            raise ScheduleError(f"Operator '{name}' is never launched.")
    order = [slot.operator for slot in schedule.slots]
    if lack := too_full(graph, machine, order, schedule.placement_of):
        raise RoomError(lack)
