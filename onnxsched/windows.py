"""HIOS's sliding window: neighbouring operators of a device side by side on its streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from onnxsched.cost import Contention, CostModel
from onnxsched.fluid import Tasks, run_tasks
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import within_memory
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import tasks_on
from onnxsched.spreading import shortest
from onnxsched_runtime.device import Device, Placement

WINDOW = 8
"""Operators of a device among which those that start together are looked for."""
HORIZON = 16
"""Operators that are simulated to judge a stage: all that follow, in a graph of so many."""
_DIGITS = 6
"""Of microseconds that are compared: what differs less is as long, but for rounding."""

Stage = dict[int, Placement]
"""Operators of one device that are launched together, each on a stream of its own."""
Arrival = tuple[float, Placement]
"""When a tensor is there, and the stream that made it."""
Judgement = tuple[float, float]
"""An estimate of the makespan, and the sum of the finishes looked at, both in microseconds."""


def hierarchical(
    graph: OperatorGraph,
    cost: CostModel,
    machine: Machine,
    order: Sequence[int],
    devices: Sequence[Device],
    width: int = WINDOW,
) -> Schedule:
    """The shortest of a mapping and one device alone, each with windows and without.

    On one device the order is that of its own upward ranks. Time: that of `with_windows`, twice.

    Args:
        graph: The operators.
        cost: Their costs.
        machine: Devices and streams.
        order: A topological launch order for the mapping.
        devices: The device of each operator, by index; they need not fit into memory.
        width: Operators in a window.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    [alone] = machine.alone.devices
    by_rank = rank_order(upward_ranks_us(graph, cost, alone))
    choices = [(by_rank, [alone] * len(graph))]
    mapped = within_memory(graph, machine, order, devices)
    if mapped is not None and set(mapped) != {alone}:
        choices.append((list(order), mapped))
    proposals = (
        with_windows(graph, cost, machine, launched, chosen, limit)
        for launched, chosen in choices
        for limit in (1, width)
    )
    return shortest(graph, cost, machine, proposals)


def with_windows(
    graph: OperatorGraph,
    cost: CostModel,
    machine: Machine,
    order: Sequence[int],
    devices: Sequence[Device],
    width: int = WINDOW,
) -> Schedule:
    """Put operators that are mapped to devices on streams, some of them side by side.

    The second half of Kundu & Shu, "HIOS" (IEEE Cluster 2023). Each device runs its operators one
    after another in `order`, on its first stream. A window of `width` operators slides over them:
    its first operator is launched together with the next ones that wait for nothing still to be
    launched, each on a stream of its own, preferably that of its last predecessor. As many as the
    machine has streams are tried first, then fewer, until the schedule gets shorter than with the
    first operator alone. HIOS measures the whole graph for that; here the next `HORIZON` operators
    are simulated from where those before them end, and what follows counts as the work left on
    each device or the longest path left, whichever is more. HIOS puts a barrier behind a stage;
    here operators wait only for what they read. O((n * HORIZON + edges) * min(width, streams)).

    Args:
        graph: The operators.
        cost: Their costs.
        machine: Devices and streams.
        order: A topological launch order.
        devices: The device of each operator, by index.
        width: Operators in a window; 1 leaves every device one stream.
    """
    if min(width, machine.stream_count) == 1:
        return Schedule(tuple(Slot(v, Placement(devices[v], 0)) for v in order))
    return slide(PartialSchedule(graph, cost, devices), order, width, machine.stream_count)


def slide(
    partial: PartialSchedule, order: Sequence[int], width: int, stream_count: int
) -> Schedule:
    """Launch everything, stage by stage; for arguments and time see `with_windows`."""
    devices = partial.devices
    everything = Unlaunched(order, partial.is_launched)
    of_device = {
        device: Unlaunched([v for v in order if devices[v] == device], partial.is_launched)
        for device in set(devices)
    }
    place = {operator: position for position, operator in enumerate(order)}
    slots: list[Slot] = []
    while ahead := everything.first(HORIZON):
        near = of_device[devices[ahead[0]]].first(width)
        ready = [v for v in near if partial.is_ready(v)][:stream_count]
        ahead = sorted({*ahead, *ready}, key=place.__getitem__)
        slots += [Slot(v, placement) for v, placement in partial.launch(ahead, ready).items()]
    return Schedule(tuple(slots))


class Unlaunched:
    """Operators in launch order, without those that are launched already."""

    def __init__(self, operators: Sequence[int], is_launched: bytearray) -> None:
        """All of them, whose flags others set by and by."""
        self._operators = operators
        self._is_launched = is_launched
        self._next = list(range(1, len(operators) + 1))
        """For each position one behind it, with none between that is not launched."""

    def first(self, count: int) -> list[int]:
        """The first few. O(count), amortized, but for a factor that hardly grows."""
        found: list[int] = []
        position = self._from(0)
        while position < len(self._operators) and len(found) < count:
            found.append(self._operators[position])
            position = self._from(position + 1)
        return found

    def _from(self, start: int) -> int:
        """The first position from one on that is not launched; the way there gets shorter."""
        operators, is_launched = self._operators, self._is_launched
        end = start
        while end < len(operators) and is_launched[operators[end]]:
            end = self._next[end]
        while start < end:
            self._next[start], start = end, self._next[start]
        return end


class PartialSchedule:
    """When and where the operators launched so far finish.

    Without slow-downs the finishes are those of `simulate`; with them, operators that run on while
    a later stage is judged do not slow it.
    """

    def __init__(self, graph: OperatorGraph, cost: CostModel, devices: Sequence[Device]) -> None:
        """Nothing is launched yet."""
        self.is_launched = bytearray(len(graph))
        self._graph = graph
        self.devices = devices
        self._contention = cost.contention
        self._tasks = tasks_on(graph, cost, devices)
        self._tails_us = _tails_us(graph, self._tasks, cost.contention)
        self._work_left_us = [0.0] * (max(self._tasks.devices, default=0) + 1)
        for operator, number in enumerate(self._tasks.devices):
            self._work_left_us[number] += self._own_us(operator)
        self.finish_us = [0.0] * len(graph)
        self._place: list[Placement] = [Placement(device, 0) for device in devices]
        self._free_us: dict[Placement, float] = {}

    def is_ready(self, operator: int) -> bool:
        """Whether all that it reads from is launched."""
        return all(self.is_launched[p] for p in self._graph.predecessors[operator])

    def launch(self, ahead: Sequence[int], ready: Sequence[int]) -> Stage:
        """Launch the first of `ahead`, and as many more of `ready` as the simulator likes."""
        part, arrivals = self._part(ahead)
        chosen, finishes_us = {}, [inf]
        judgement = (inf, inf)
        for stage in self._stages(ready):
            tried_us = self._simulated(ahead, part, arrivals, stage)
            if (tried := self._judged(ahead, tried_us)) < judgement:
                chosen, finishes_us, judgement = stage, tried_us, tried
                if len(stage) > 1:
                    break
        for operator, finish_us in zip(ahead, finishes_us, strict=True):
            if operator in chosen:
                place = self._place[operator] = chosen[operator]
                self.is_launched[operator] = 1
                self.finish_us[operator] = self._free_us[place] = finish_us
                self._work_left_us[self._tasks.devices[operator]] -= self._own_us(operator)
        return chosen

    def _stages(self, ready: Sequence[int]) -> Iterator[Stage]:
        """The first operator alone, on the first stream or its own; then as many as can be."""
        first = Placement(self.devices[ready[0]], 0)
        favourites = [self._favourite(operator) for operator in ready]
        for place in dict.fromkeys((first, favourites[0])):
            yield {ready[0]: place}
        for count in range(len(ready), 1, -1):
            stage: Stage = {}
            for operator, favourite in zip(ready[:count], favourites, strict=False):
                if favourite not in stage.values():
                    stage[operator] = favourite
            streams = (Placement(first.device, stream) for stream in range(count))
            free = (place for place in streams if place not in stage.values())
            yield {v: stage[v] if v in stage else next(free) for v in ready[:count]}

    def _favourite(self, operator: int) -> Placement:
        """The stream of the predecessor on the same device that finishes last, or the first."""
        device = self.devices[operator]
        near = [p for p in self._graph.predecessors[operator] if self.devices[p] == device]
        last = max(near, key=self.finish_us.__getitem__, default=None)
        return Placement(device, 0) if last is None else self._place[last]

    def _part(self, ahead: Sequence[int]) -> tuple[Tasks, list[list[Arrival]]]:
        """The operators `ahead` as tasks of their own, and what reaches them from before."""
        number = {operator: index for index, operator in enumerate(ahead)}
        tasks = self._tasks
        inside = tuple(
            tuple((number[p], us) for p, us in tasks.incoming[v] if p in number) for v in ahead
        )
        arrivals = [
            [
                (self.finish_us[p] + us, self._place[p])
                for p, us in tasks.incoming[v]
                if p not in number
            ]
            for v in ahead
        ]
        part = Tasks(
            durations_us=[tasks.durations_us[v] for v in ahead],
            sm_shares=[tasks.sm_shares[v] for v in ahead],
            devices=[tasks.devices[v] for v in ahead],
            incoming=inside,
            ready_us=(),
        )
        return part, arrivals

    def _simulated(
        self,
        ahead: Sequence[int],
        part: Tasks,
        arrivals: Sequence[Sequence[Arrival]],
        stage: Stage,
    ) -> list[float]:
        """When operators finish if `stage` comes first and the others on the first streams."""
        places = [stage.get(v) or Placement(self.devices[v], 0) for v in ahead]
        order = [i for i, v in enumerate(ahead) if v in stage]
        order += [i for i, v in enumerate(ahead) if v not in stage]
        event_us = self._contention.event_us
        ready_us = [
            max((us + (event_us if p != place else 0.0) for us, p in reached), default=0.0)
            for reached, place in zip(arrivals, places, strict=True)
        ]
        seen: set[Placement] = set()
        for index in order:
            if places[index] not in seen:
                seen.add(places[index])
                free_us = self._free_us.get(places[index], 0.0)
                ready_us[index] = max(ready_us[index], free_us)
        part = replace(part, ready_us=ready_us)
        return run_tasks(part, self._contention, order, places)[1]

    def _judged(self, ahead: Sequence[int], finishes_us: Sequence[float]) -> Judgement:
        """The longest way to the end after `ahead`: along a path, or on a device."""
        last_us: dict[int, float] = {}
        left_us = self._work_left_us.copy()
        makespan_us = 0.0
        for operator, us in zip(ahead, finishes_us, strict=True):
            number = self._tasks.devices[operator]
            makespan_us = max(makespan_us, us + self._tails_us[operator])
            last_us[number] = max(last_us.get(number, 0.0), us)
            left_us[number] -= self._own_us(operator)
        for number, us in last_us.items():
            makespan_us = max(makespan_us, us + left_us[number])
        return round(makespan_us, _DIGITS), round(sum(finishes_us), _DIGITS)

    def _own_us(self, operator: int) -> float:
        """What an operator adds to its device, alone."""
        contention = self._contention
        return (
            contention.start_us + self._tasks.durations_us[operator] * contention.duration_factor
        )


def _tails_us(graph: OperatorGraph, tasks: Tasks, contention: Contention) -> list[float]:
    """The longest way from the finish of each operator to the end, with the transfers on it."""
    tails_us = [0.0] * len(graph)
    for operator in reversed(range(len(graph))):
        own_us = tasks.durations_us[operator] * contention.duration_factor
        way_us = contention.start_us + own_us + tails_us[operator]
        for producer, delay_us in tasks.incoming[operator]:
            tails_us[producer] = max(tails_us[producer], delay_us + way_us)
    return tails_us
