"""HEFT: the most urgent operator first, where it finishes earliest."""

from __future__ import annotations

from bisect import bisect_left, insort

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.device import Placement

Interval = tuple[float, float]
"""Start and finish in microseconds."""


def heft(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Heterogeneous earliest finish time, over the streams of all devices.

    Topcuoglu et al., IEEE TPDS 2002: operators by decreasing upward rank, each where it finishes
    first, idle gaps included. Ties go to the stream of the predecessor that finishes last, which
    saves an event, then to the lowest placement. Operators are launched by start, then finish,
    then rank. This keeps the order of every stream, and is topological: a consumer starts no
    earlier than its producer finishes, and where all times are equal the rank decides.
    Streams not yet in use are all alike, so only the first is tried. O(edges * devices^2 +
    n log n + n * streams in use), and the busy intervals passed over while looking for a gap.
    """
    busy: dict[Placement, list[Interval]] = {placement: [] for placement in machine.placements}
    intervals: dict[int, Interval] = {}
    placement_of: dict[int, Placement] = {}
    for operator in rank_order(upward_ranks_us(graph, cost, *machine.devices)):
        last = max(graph.predecessors[operator], key=lambda p: intervals[p][1], default=None)
        favourite = None if last is None else placement_of[last]
        inputs = [
            (intervals[edge.producer][1], edge.nbytes, placement_of[edge.producer].device)
            for edge in graph.incoming[operator]
        ]
        options: list[tuple[float, bool, float, Placement]] = []
        for device in machine.devices:
            ready_us = max(
                (us + cost.transfer_us(nbytes, source, device) for us, nbytes, source in inputs),
                default=0.0,
            )
            duration_us = cost.operator(operator, device).duration_us
            for stream in range(machine.stream_count):
                placement = Placement(device, stream)
                start_us = _earliest_start_us(busy[placement], ready_us, duration_us)
                finish_us = start_us + duration_us
                options.append((finish_us, placement != favourite, start_us, placement))
                if not busy[placement]:
                    break  # Streams are opened in order, so all further ones are empty as well.
        finish_us, _, start_us, placement = min(options, key=lambda option: option[:2])
        insort(busy[placement], (start_us, finish_us))
        intervals[operator] = (start_us, finish_us)
        placement_of[operator] = placement
    # Sorting is stable, and `intervals` was filled by rank.
    by_start = sorted(intervals, key=intervals.__getitem__)
    return Schedule(tuple(Slot(operator, placement_of[operator]) for operator in by_start))


def _earliest_start_us(busy: list[Interval], ready_us: float, duration_us: float) -> float:
    """The start of the first gap after `ready_us` that is long enough.

    `busy` is sorted and its intervals do not overlap.
    """
    position = bisect_left(busy, (ready_us, ready_us))
    start_us = max(ready_us, busy[position - 1][1]) if position else ready_us
    while position < len(busy) and start_us + duration_us > busy[position][0]:
        start_us = busy[position][1]
        position += 1
    return start_us
