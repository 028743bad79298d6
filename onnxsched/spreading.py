"""Several devices or one: the shortest schedule that fits, and one for models that hardly do."""

from __future__ import annotations

from collections.abc import Iterable

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import RoomError


def shortest(
    graph: OperatorGraph,
    cost: CostModel,
    machine: Machine,
    proposals: Iterable[Schedule | None],
) -> Schedule:
    """The proposal with the shortest simulated makespan, of those that fit into memory.

    The first of equals, so those on one device should come first. Where none fits, `spread`.

    Args:
        graph: What is scheduled.
        cost: Its costs.
        machine: Where it will run.
        proposals: Valid but for their memory; None where a policy found no room.

    Raises:
        RoomError: The model does not fit.
    """
    fitting = [p for p in proposals if p is not None and _fits(graph, machine, p)]
    if not fitting:
        return spread(graph, machine)
    if len(fitting) == 1:
        return fitting[0]
    return min(fitting, key=lambda schedule: simulate(graph, cost, schedule).makespan_us)


def spread(graph: OperatorGraph, machine: Machine) -> Schedule:
    """Fill one device after another, in the graph's order, on one stream each.

    It is slow but thrifty: tensors are freed after their last reader, and only those alive where
    one device takes over from another are held twice. The device with the most memory comes first,
    so what fits on one device fits here. O((operators + edges) * devices).

    Raises:
        RoomError: Not everything fits.
    """
    slots: list[Slot] = []
    for device in sorted(machine.devices, key=machine.room_nbytes, reverse=True):
        end = _end_of_piece(graph, len(slots), machine.room_nbytes(device))
        slots += [Slot(v, Placement(device, 0)) for v in range(len(slots), end)]
    if len(slots) < len(graph):
        rooms = ", ".join(f"{d} with {machine.room_nbytes(d)} bytes" for d in machine.devices)
        raise RoomError(
            f"The model does not fit into the memory of {rooms}: no device has room for operator "
            f"'{graph.operators[len(slots)].name}' and those after it; use more devices, "
            "or smaller inputs."
        )
    return Schedule(tuple(slots))


def _end_of_piece(graph: OperatorGraph, first: int, room_nbytes: float) -> int:
    """The furthest end of a piece that starts with `first` and fits; `first` if none does.

    What a piece needs is at most its weights, what it receives, the most that is alive at once in
    it, and what it hands on. It does not grow with the piece, so all ends are looked at.
    """
    last_reader = {tensor: edges[-1].consumer for tensor, edges in graph.tensors.items()}
    held: set[str] = set()
    resident = live = peak = 0
    end = first
    for operator in range(first, len(graph)):
        node = graph.operators[operator]
        received = [edge for edge in graph.incoming[operator] if edge.producer < first]
        for tensor, nbytes in [(w.tensor, w.nbytes) for w in node.weights] + [
            (edge.tensor, edge.nbytes) for edge in received
        ]:
            if tensor not in held:
                held.add(tensor)
                resident += nbytes
        resident += node.kept_nbytes
        live += sum({e.tensor: e.nbytes for e in graph.outgoing[operator]}.values())
        peak = max(peak, live + node.scratch_nbytes)
        live -= sum(
            edge.nbytes
            for edge in graph.incoming[operator]
            if edge.producer >= first and last_reader[edge.tensor] == operator
        )
        if resident + peak + live <= room_nbytes:
            end = operator + 1
    return end


def _fits(graph: OperatorGraph, machine: Machine, schedule: Schedule) -> bool:
    order = [slot.operator for slot in schedule.slots]
    return too_full(graph, machine, order, schedule.placement_of) is None
