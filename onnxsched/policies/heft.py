"""HEFT: the most urgent operator first, where it finishes earliest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf

from onnxsched.cost import CostModel
from onnxsched.delays import delays_between
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import Ledger
from onnxsched.rank import durations_us, rank_order, upward_ranks_us
from onnxsched.schedule import Schedule, Slot
from onnxsched.spreading import shortest

_MOST_PASSED = 256
"""Gaps that are tried for an operator on a stream."""
Interval = tuple[float, float]
"""Start and finish in microseconds."""


def heft(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Heterogeneous earliest finish time, over the streams of all devices or of one.

    `earliest_finish` on the whole machine, or on one device where that is simulated faster: HEFT
    moves an operator away where that operator gains, though its readers may lose more. Time: that
    of both.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    proposals = [earliest_finish(graph, cost, replace(machine.alone, memory_nbytes={}))]
    if len(machine.devices) > 1:
        proposals.append(earliest_finish(graph, cost, machine))
    return shortest(graph, cost, machine, proposals)


def earliest_finish(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule | None:
    """HEFT as published; None where an operator finds no room on any device.

    Topcuoglu et al., IEEE TPDS 2002: operators by decreasing upward rank, each where it finishes
    first, idle gaps included. Ties go to the stream of the predecessor that finishes last, which
    saves an event, then to the lowest placement. Operators are launched by start, then finish,
    then rank. This keeps the order of every stream, and is topological: a consumer starts no
    earlier than its producer finishes, and where all times are equal the rank decides.
    Streams not yet in use are all alike, so only the first is tried. O(edges * devices +
    n log n + n * streams in use), and the gaps passed over as too short, `_MOST_PASSED` at most
    for each; gaps too short for anything that is still to come are forgotten.
    """
    devices, stream_count = machine.devices, machine.stream_count
    on_device = [durations_us(graph, cost, device) for device in devices]
    order = rank_order(upward_ranks_us(graph, cost, *devices))
    inputs_of = delays_between(graph, cost, devices)
    ledger = Ledger(graph, machine)
    gaps: list[list[Interval]] = [[(0.0, inf)] for _ in range(len(devices) * stream_count)]
    intervals: dict[int, Interval] = {}
    stream_of: dict[int, int] = {}  # Numbered as in `machine.placements`.
    for operator, shortest_us in zip(order, _shortest_after_us(order, on_device), strict=True):
        last = max(graph.predecessors[operator], key=lambda p: intervals[p][1], default=None)
        inputs = [
            (intervals[p][1], delays[stream_of[p] // stream_count])
            for p, delays in inputs_of[operator]
        ]
        ready_us = [
            max((made_us + delay_us[number] for made_us, delay_us in inputs), default=0.0)
            if ledger.left_nbytes(operator, device) >= 0
            else inf
            for number, device in enumerate(devices)
        ]
        finish_us = inf
        for stream in _options(gaps, stream_count, None if last is None else stream_of[last]):
            device = stream // stream_count
            duration_us = on_device[device][operator]
            start_us = _earliest_start_us(gaps[stream], ready_us[device], duration_us, finish_us)
            if start_us < inf:
                finish_us = start_us + duration_us
                intervals[operator] = (start_us, finish_us)
                stream_of[operator] = stream
        if finish_us == inf:
            return None
        ledger.place(operator, devices[stream_of[operator] // stream_count])
        _occupy(gaps[stream_of[operator]], intervals[operator], shortest_us)
    # Sorting is stable, and `intervals` was filled by rank.
    by_start = sorted(intervals, key=intervals.__getitem__)
    placements = machine.placements
    return Schedule(tuple(Slot(v, placements[stream_of[v]]) for v in by_start))


def _shortest_after_us(
    order: Sequence[int], on_device: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """The shortest duration on any device of those after each in `order`; inf for the last."""
    shortest = (min(us[operator] for us in on_device) for operator in reversed(order))
    return tuple(accumulate(shortest, min, initial=inf))[-2::-1]


def _options(
    gaps: Sequence[list[Interval]], stream_count: int, favourite: int | None
) -> Iterator[int]:
    """Streams to try, those first that win ties; of a device's empty ones only the first."""
    if favourite is not None:
        yield favourite
    for first in range(0, len(gaps), stream_count):
        for stream in range(first, first + stream_count):
            yield stream
            if gaps[stream] == [(0.0, inf)]:
                break  # Streams are opened in order, so all further ones are empty as well.


def _earliest_start_us(
    gaps: Sequence[Interval], ready_us: float, duration_us: float, before_us: float
) -> float:
    """The start in the first gap after `ready_us` that is long enough.

    `gaps` is sorted, the last one has no end. So it is taken where very many are too short. inf
    where it would not finish before `before_us`.
    """
    if ready_us + duration_us >= before_us:
        return inf
    first = max(0, bisect_right(gaps, (ready_us, inf)) - 1)
    for free_us, taken_us in (*gaps[first : first + _MOST_PASSED], gaps[-1]):
        start_us = max(ready_us, free_us)
        if start_us + duration_us >= before_us:
            return inf
        if start_us + duration_us <= taken_us:
            return start_us
    return inf


def _occupy(gaps: list[Interval], interval: Interval, shortest_us: float) -> None:
    """Take an interval out of its gap; keep what is long enough for `shortest_us`."""
    start_us, finish_us = interval
    position = bisect_right(gaps, (start_us, inf)) - 1
    free_us, taken_us = gaps[position]
    sides = ((free_us, start_us), (finish_us, taken_us))
    gaps[position : position + 1] = [(a, b) for a, b in sides if a + shortest_us <= b]
