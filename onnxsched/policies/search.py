"""Search: list scheduling under contention, then local search on the simulator."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from onnxsched.cost import Contention, CostModel, OperatorCost
from onnxsched.delays import Inputs, delays_between
from onnxsched.fluid import Tasks, Times, run_tasks
from onnxsched.graph import OperatorGraph
from onnxsched.links import Outputs, outputs_of, sends_between
from onnxsched.machine import Machine
from onnxsched.memory import fits_anyhow, too_full
from onnxsched.rank import rank_order
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import tasks_on
from onnxsched.spreading import spread
from onnxsched.steps import Arrangement, neighbour
from onnxsched_runtime.errors import RoomError

WORK_LIMIT = 300_000
"""Operators that local search simulates in all: a second or two on one device, and some more on
several, however large the graph."""
LARGEST = 3_000
"""With more operators so few steps are left that none is taken, and only the first start is."""
WORTH = 1e-4
"""The share of the makespan that another stream, or tensor that changes stream, must gain."""

Start = Callable[[OperatorGraph, CostModel, Machine], Schedule | None]
"""Makes a schedule to start from, or has none for this graph."""
Judgement = tuple[float, int]
"""Makespan in microseconds, and how many streams there are and tensors that change stream."""


def search(
    graph: OperatorGraph,
    cost: CostModel,
    machine: Machine,
    *,
    starts: Sequence[Start] = (),
    effort: int = 1,
) -> Schedule:
    """Look for the shortest simulated schedule on the streams of all devices.

    Starts from the best of one stream, `starts`, of which graphs above `LARGEST` only try the
    first, and two list schedules made under `cost.contention`, in order of upward rank with and
    without the overheads; on several devices also from what is found on one of them. From there
    random steps (`onnxsched.steps`; streams are numbered as in `Machine.placements`). One is kept
    where it fits into memory and the simulator finds it no slower, and faster by `WORTH` where it
    spreads more. The seed is fixed, and the result never slower in simulation than any of these.
    O(n * streams^2 + edges * streams), and at most `effort` times 10 n simulations and
    `WORK_LIMIT` operators, for all devices, and once for one.

    Raises:
        RoomError: The model does not fit into the devices' memory.
    """
    problem = _Problem.of(graph, cost, machine)
    found: list[Arrangement] = [([*range(len(graph))], [0] * len(graph))]
    for start in starts if len(graph) <= LARGEST else starts[:1]:
        with suppress(RoomError):  # It may find no room where another does.
            made = start(graph, cost, machine)
            found += [] if made is None else [problem.arrangement(made)]
    if len(machine.devices) > 1:
        with suppress(RoomError):  # One device may be too small.
            alone = search(graph, cost, machine.alone, starts=starts)
            found.append(problem.arrangement(alone))
    contention = cost.contention
    for overhead_us in dict.fromkeys((0.0, contention.start_us + contention.event_us)):
        found.append(_list_schedule(problem, rank_order(_ranks_us(problem, overhead_us))))
    best = min(found, key=problem.judge)
    if problem.judge(best)[0] == inf:
        best = problem.arrangement(spread(graph, machine))
    if len(machine.placements) > 1 and len(graph) <= LARGEST:
        least_us = max(_ranks_us(problem, contention.start_us), default=0.0)
        best = _improved(problem, best, least_us, effort)
    return problem.schedule(best)


@dataclass(frozen=True)
class _Problem:
    """What is to be scheduled, as tables; devices are numbered as in the machine."""

    graph: OperatorGraph
    machine: Machine
    contention: Contention
    inputs: Sequence[Inputs]
    costs: Sequence[Sequence[OperatorCost]]
    """By device and operator."""
    outputs: Sequence[Outputs]
    on_first: Tasks
    """The operators as tasks of the first device."""
    fits_anyhow: bool
    """No arrangement is too full for the memory."""

    @classmethod
    def of(cls, graph: OperatorGraph, cost: CostModel, machine: Machine) -> _Problem:
        """Ask the cost model for all that there is to know."""
        devices = machine.devices
        costs = [[cost.operator(v, device) for v in range(len(graph))] for device in devices]
        on_first = tasks_on(graph, cost, [devices[0]] * len(graph))
        inputs = delays_between(graph, cost, devices)
        outputs = outputs_of(graph, cost, devices)
        fits = fits_anyhow(graph, machine)
        return cls(graph, machine, cost.contention, inputs, costs, outputs, on_first, fits)

    def times(self, arrangement: Arrangement) -> Times:
        """When each operator starts and finishes, as `simulate` would say."""
        order, lanes = arrangement
        return run_tasks(self._tasks(lanes), self.contention, order, lanes)

    def judge(self, arrangement: Arrangement) -> Judgement:
        """How good an arrangement is; infinitely bad where it does not fit into memory."""
        order, lanes = arrangement
        crossings = sum(lanes[edge.producer] != lanes[edge.consumer] for edge in self.graph.edges)
        spread_over = crossings + len(set(lanes))
        if not self.fits_anyhow:
            places = self.machine.placements
            placement_of = {v: places[lane] for v, lane in enumerate(lanes)}
            if too_full(self.graph, self.machine, order, placement_of):
                return inf, spread_over
        return max(self.times(arrangement)[1], default=0.0), spread_over

    def arrangement(self, schedule: Schedule) -> Arrangement:
        """A schedule with its placements as numbers."""
        number = {place: index for index, place in enumerate(self.machine.placements)}
        lanes = [number[schedule.placement_of[v]] for v in range(len(self.graph))]
        return [slot.operator for slot in schedule.slots], lanes

    def schedule(self, arrangement: Arrangement) -> Schedule:
        """Launched by simulated start, then finish, which keeps the order of every stream."""
        order, lanes = arrangement
        starts_us, finishes_us = self.times(arrangement)
        by_start = sorted(order, key=lambda v: (starts_us[v], finishes_us[v]))
        used = dict.fromkeys(lanes[v] for v in by_start)
        number = {
            lane: place
            for first in range(0, len(self.machine.placements), self.machine.stream_count)
            for place, lane in enumerate(
                (lane for lane in used if first <= lane < first + self.machine.stream_count), first
            )
        }
        placements = self.machine.placements
        return Schedule(tuple(Slot(v, placements[number[lanes[v]]]) for v in by_start))

    def _tasks(self, lanes: Sequence[int]) -> Tasks:
        if len(self.machine.devices) == 1:
            return self.on_first
        devices = [lane // self.machine.stream_count for lane in lanes]
        costs = [self.costs[device][v] for v, device in enumerate(devices)]
        return Tasks(
            durations_us=[cost.duration_us for cost in costs],
            sm_shares=[cost.sm_share for cost in costs],
            devices=devices,
            incoming=[
                [(p, delays[devices[p]][device]) for p, delays in inputs]
                for inputs, device in zip(self.inputs, devices, strict=True)
            ],
            ready_us=self.on_first.ready_us,
            sends=sends_between(self.outputs, devices, len(self.machine.devices)),
        )


def _ranks_us(problem: _Problem, overhead_us: float) -> list[float]:
    """Upward ranks on the fastest device of each, where all take some time beside their own."""
    ranks_us = [0.0] * len(problem.graph)
    for operator in reversed(range(len(ranks_us))):
        own_us = min(costs[operator].duration_us for costs in problem.costs)
        successors = problem.graph.successors[operator]
        tail_us = max((ranks_us[after] for after in successors), default=0.0)
        ranks_us[operator] = overhead_us + own_us * problem.contention.duration_factor + tail_us
    return ranks_us


def _list_schedule(problem: _Problem, order: Sequence[int]) -> Arrangement:
    """Each operator, in `order`, behind the last one of the stream where it finishes first.

    Its finish is estimated from what runs at its start; what it does to those is left to the
    simulator. Of a device's streams not yet in use only the first is tried: they are all alike.
    """
    contention, stream_count = problem.contention, problem.machine.stream_count
    lanes = [0] * len(order)
    spans_us = [(0.0, 0.0)] * len(order)
    last_on: list[list[int]] = [[] for _ in problem.machine.devices]
    for operator in order:
        best_us = (0.0, inf)
        for device, last in enumerate(last_on):
            cost = problem.costs[device][operator]
            duration_us = cost.duration_us * contention.duration_factor
            ready_us = [
                (spans_us[p][1] + delays[lanes[p] // stream_count][device], lanes[p])
                for p, delays in problem.inputs[operator]
            ]
            for stream in range(min(stream_count, len(last) + 1)):
                lane = device * stream_count + stream
                start_us = spans_us[last[stream]][1] if stream < len(last) else 0.0
                for us, source in ready_us:
                    start_us = max(start_us, us + (contention.event_us if source != lane else 0.0))
                start_us += contention.start_us
                if start_us + duration_us >= best_us[1]:
                    continue
                slowdown = 1.0
                for other in last[:stream] + last[stream + 1 :]:
                    if spans_us[other][0] <= start_us < spans_us[other][1]:
                        share = problem.costs[device][other].sm_share
                        slowdown += contention.launch_slowdown + contention.sm_slowdown * share
                if start_us + duration_us * slowdown < best_us[1]:
                    best_us = (start_us, start_us + duration_us * slowdown)
                    lanes[operator] = lane
        spans_us[operator] = best_us
        device, stream = divmod(lanes[operator], stream_count)
        last_on[device][stream : stream + 1] = [operator]
    return list(order), lanes


def _improved(problem: _Problem, start: Arrangement, least_us: float, effort: int) -> Arrangement:
    """The end of a random walk that never goes up; it stops where nothing can be better."""
    rng = random.Random(0)
    graph, stream_count = problem.graph, len(problem.machine.placements)
    best, (makespan_us, spread_over) = start, problem.judge(start)
    for _ in range(effort * min(10 * len(graph), WORK_LIMIT // max(1, len(graph)))):
        if makespan_us <= least_us and spread_over <= 1:
            break
        tried = neighbour(graph, best, stream_count, rng)
        if tried == best:
            continue
        tried_us, tried_over = problem.judge(tried)
        gain_us = WORTH * makespan_us if tried_over > spread_over else 0.0
        if tried_us <= makespan_us - gain_us:
            best, makespan_us, spread_over = tried, tried_us, tried_over
    return best
