"""How much memory a schedule needs on each device: weights, and a bound on live tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched_runtime.device import Device, Placement


def needed_nbytes(
    graph: OperatorGraph, order: Sequence[int], placement_of: Mapping[int, Placement]
) -> dict[Device, int]:
    """The most that each device can have to hold at once, whatever the timing.

    Weights are counted once on each device that reads them, and what is kept to the end once. A
    tensor that one stream both makes and reads is there from its producer to its last reader, and
    streams follow the launch order, so the largest sum of such tensors is known for each stream; a
    device may see the largest of all its streams at once. Other tensors are counted on every
    device that makes or reads them, for the whole run: copies are made as early as can be. For one
    stream this is exact, but for outputs of the model that operators read too, which count twice,
    and for pieces of a tensor that are left in it: they keep all of it, at most twice what they
    are counted for. O(operators + edges).

    Args:
        graph: The operators.
        order: Their launch order.
        placement_of: Where each runs.
    """
    total: dict[Device, int] = defaultdict(int)
    for operator in order:
        total[placement_of[operator].device] += graph.operators[operator].kept_nbytes
    weights = {
        (placement_of[v].device, weight.tensor): weight.nbytes
        for v in order
        for weight in graph.operators[v].weights
    }
    for (device, _), nbytes in weights.items():
        total[device] += nbytes
    born, freed = [0] * len(graph), [0] * len(graph)
    position = {operator: place for place, operator in enumerate(order)}
    for edges in graph.tensors.values():
        producer, nbytes = edges[0].producer, edges[0].nbytes
        places = {placement_of[edge.consumer] for edge in edges} | {placement_of[producer]}
        if len(places) == 1:
            born[producer] += nbytes
            freed[max((edge.consumer for edge in edges), key=position.__getitem__)] += nbytes
        else:
            for device in {place.device for place in places}:
                total[device] += nbytes
    for placement, peak in _peaks(graph, order, placement_of, born, freed).items():
        total[placement.device] += peak
    return dict(total)


def _peaks(
    graph: OperatorGraph,
    order: Sequence[int],
    placement_of: Mapping[int, Placement],
    born: Sequence[int],
    freed: Sequence[int],
) -> dict[Placement, int]:
    """The most that each stream holds at once of what no other stream sees."""
    live: dict[Placement, int] = defaultdict(int)
    peaks: dict[Placement, int] = defaultdict(int)
    for operator in order:
        place = placement_of[operator]
        live[place] += born[operator]
        peaks[place] = max(peaks[place], live[place] + graph.operators[operator].scratch_nbytes)
        live[place] -= freed[operator]
    return peaks


def too_full(
    graph: OperatorGraph,
    machine: Machine,
    order: Sequence[int],
    placement_of: Mapping[int, Placement],
) -> str | None:
    """What a device lacks for what `needed_nbytes` says, in a sentence; None where all have it."""
    if fits_anyhow(graph, machine):
        return None
    for device, nbytes in needed_nbytes(graph, order, placement_of).items():
        room_nbytes = machine.room_nbytes(device)
        if nbytes > room_nbytes:
            return (
                f"The schedule needs up to {nbytes} bytes on {device}, which has {room_nbytes}; "
                "use more devices or smaller inputs."
            )
    return None


def fits_anyhow(graph: OperatorGraph, machine: Machine) -> bool:
    """Whether every device has room for all there is, so that no schedule is too full."""
    return graph.total_nbytes <= min(map(machine.room_nbytes, machine.devices))


def fits_on_first(graph: OperatorGraph, machine: Machine) -> bool:
    """Whether the first device alone has room for the graph, one operator after another."""
    order = range(len(graph))
    placement = Placement(machine.devices[0], 0)
    return too_full(graph, machine, order, dict.fromkeys(order, placement)) is None


class Ledger:
    """How full devices are while operators are placed, as if nothing was ever freed.

    An operator needs its weights, all that it reads and all that it writes on its device, each
    once however many operators share it. Never less than `needed_nbytes`, whatever the streams.
    """

    def __init__(self, graph: OperatorGraph, machine: Machine) -> None:
        """Nothing is placed yet."""
        self._graph = graph
        self._is_limited = machine.is_limited
        self._left = {device: machine.room_nbytes(device) for device in machine.devices}
        self._held: dict[Device, set[str]] = {device: set() for device in machine.devices}

    def left_nbytes(self, operator: int, device: Device) -> float:
        """What is left on `device` once this operator is placed there; below 0 it can't be."""
        if not self._is_limited:
            return self._left[device]
        taken = sum(self._added(operator, device).values())
        node = self._graph.operators[operator]
        return self._left[device] - taken - node.kept_nbytes - node.scratch_nbytes

    def place(self, operator: int, device: Device) -> None:
        """Take what an operator needs."""
        if self._is_limited:
            self._left[device] = self.left_nbytes(operator, device)
            self._held[device].update(self._added(operator, device))

    def _added(self, operator: int, device: Device) -> dict[str, int]:
        """The tensors that come to `device` with an operator, and their bytes."""
        held = self._held[device]
        edges = (*self._graph.incoming[operator], *self._graph.outgoing[operator])
        tensors = {
            weight.tensor: weight.nbytes for weight in self._graph.operators[operator].weights
        }
        tensors |= {edge.tensor: edge.nbytes for edge in edges}
        return {tensor: nbytes for tensor, nbytes in tensors.items() if tensor not in held}


def within_memory(
    graph: OperatorGraph, machine: Machine, order: Sequence[int], devices: Sequence[Device]
) -> list[Device] | None:
    """The device of each operator, changed where it would be too full; None where all would be.

    In `order`, an operator that its device has no room for goes to the one with the most left.
    O((operators + edges) * devices).
    """
    if not machine.is_limited:
        return list(devices)
    ledger = Ledger(graph, machine)
    found = list(devices)
    for operator in order:
        if ledger.left_nbytes(operator, found[operator]) < 0:
            left = {device: ledger.left_nbytes(operator, device) for device in machine.devices}
            found[operator] = max(machine.devices, key=left.__getitem__)
            if left[found[operator]] < 0:
                return None
        ledger.place(operator, found[operator])
    return found
