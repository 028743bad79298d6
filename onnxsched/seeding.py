"""A schedule for a model in bands: each band on a device of its own."""

from __future__ import annotations

import re

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import within_memory
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched.spreading import shortest
from onnxsched.windows import WINDOW, with_windows

_BAND = re.compile(r".*/band(\d+)(?:/|_token_|$)")
"""A node of a band, or what ONNX Runtime calls it when it has lowered it."""


def band_schedule(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule | None:
    """Band k on device k, all else on the first device; None without bands or other devices.

    Policies place one operator after another and don't see that bands belong together; this is
    for them to be measured against. Operators are launched by upward rank as HEFT does, and put on
    streams as HIOS does, or on one for each device where that is simulated shorter.
    O(n * HORIZON * streams + edges).

    Args:
        graph: Operators, or chains of them: bands are known by the names that `banded` gives.
        cost: Their costs.
        machine: Devices and streams; of more bands than devices several share one.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    bands = [band_of(operator.name) for operator in graph.operators]
    if len(machine.devices) < 2 or all(band is None for band in bands):
        return None
    numbers = [
        0 if band is None or _cuts_what_is_whole(graph, bands, operator) else band
        for operator, band in enumerate(bands)
    ]
    devices = [machine.devices[number % len(machine.devices)] for number in numbers]
    order = rank_order(upward_ranks_us(graph, cost, *machine.devices))
    fitting = within_memory(graph, machine, order, devices)
    if fitting is None:
        return shortest(graph, cost, machine, ())
    proposals = [
        with_windows(graph, cost, machine, order, fitting, width) for width in (1, WINDOW)
    ]
    return shortest(graph, cost, machine, proposals)


def band_of(name: str) -> int | None:
    """The band that an operator belongs to, None where it belongs to none."""
    match = _BAND.match(name)
    return None if match is None else int(match[1])


def _cuts_what_is_whole(graph: OperatorGraph, bands: list[int | None], operator: int) -> bool:
    """Whether an operator cuts rows out of a whole tensor: only these need to cross then."""
    producers = graph.predecessors[operator]
    is_slice = graph.operators[operator].op_type in ("Slice", "Transpose")  # which takes one in
    return is_slice and bool(producers) and all(bands[p] is None for p in producers)
