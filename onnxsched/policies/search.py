"""Search: list scheduling under contention, then local search on the simulator."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import inf

from onnxsched.cost import Contention, CostModel
from onnxsched.fluid import Tasks, run_tasks
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import rank_order
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import tasks_on

WORK_LIMIT = 300_000
"""Operators that local search simulates in all: a second or two, however large the graph."""
LARGEST = 3_000
"""With more operators so few steps are left that none is taken."""
WORTH = 1e-4
"""The share of the makespan that another stream, or tensor that changes stream, must gain."""

Start = Callable[[OperatorGraph, CostModel, Machine], Schedule]
"""Makes a schedule to start from."""
Arrangement = tuple[list[int], list[int]]
"""The operators in launch order, and the stream of each operator."""
Judgement = tuple[float, int]
"""Makespan in microseconds, and how many streams there are and tensors that change stream."""


def search(
    graph: OperatorGraph, cost: CostModel, machine: Machine, *, starts: Sequence[Start] = ()
) -> Schedule:
    """Look for the shortest simulated schedule on the streams of the first device.

    Starts from the best of one stream, `starts`, and two list schedules made under
    `cost.contention`, in order of upward rank with and without the overheads. From there random
    steps: an operator moves to another stream, two exchange streams, two streams exchange their
    tails or one takes the other's, an operator is launched earlier or later. A step is kept where
    the simulator finds it no slower, and faster by `WORTH` where it spreads more. The seed is
    fixed, and the result never slower in simulation than any start. O(n * streams^2 + edges *
    streams), and at most 10 n simulations and `WORK_LIMIT` operators.
    """
    alone = Machine(machine.devices[:1], machine.stream_count)
    contention = cost.contention
    tasks = tasks_on(graph, cost, [machine.devices[0]] * len(graph))

    def judge(arrangement: Arrangement) -> Judgement:
        order, lanes = arrangement
        makespan_us = max(run_tasks(tasks, contention, order, lanes)[1], default=0.0)
        crossings = sum(lanes[edge.producer] != lanes[edge.consumer] for edge in graph.edges)
        return makespan_us, crossings + len(set(lanes))

    found: list[Arrangement] = [([*range(len(graph))], [0] * len(graph))]
    found += [_arrangement(start(graph, cost, alone)) for start in starts]
    for overhead_us in dict.fromkeys((0.0, contention.start_us + contention.event_us)):
        order = rank_order(_ranks_us(graph, tasks, contention, overhead_us))
        found.append(_list_schedule(tasks, contention, order, machine.stream_count))
    best = min(found, key=judge)
    if machine.stream_count > 1 and len(graph) <= LARGEST:
        least_us = max(_ranks_us(graph, tasks, contention, contention.start_us), default=0.0)
        best = _improved(graph, best, machine.stream_count, judge, least_us)
    return _schedule(best, tasks, contention, alone)


def _arrangement(schedule: Schedule) -> Arrangement:
    placement_of = schedule.placement_of
    lanes = [placement_of[operator].stream for operator in range(len(placement_of))]
    return [slot.operator for slot in schedule.slots], lanes


def _ranks_us(
    graph: OperatorGraph, tasks: Tasks, contention: Contention, overhead_us: float
) -> list[float]:
    """Upward ranks, where every operator takes some time beside its own."""
    ranks_us = [0.0] * len(graph)
    for operator in reversed(range(len(graph))):
        tail_us = max((ranks_us[after] for after in graph.successors[operator]), default=0.0)
        own_us = tasks.durations_us[operator] * contention.duration_factor
        ranks_us[operator] = overhead_us + own_us + tail_us
    return ranks_us


def _list_schedule(
    tasks: Tasks, contention: Contention, order: Sequence[int], stream_count: int
) -> Arrangement:
    """Each operator, in `order`, behind the last one of the stream where it finishes first.

    Its finish is estimated from what runs at its start; what it does to those is left to the
    simulator. Streams not yet in use are all alike, so only the first is tried.
    """
    lanes = [0] * len(order)
    spans_us = [(0.0, 0.0)] * len(order)
    last_on: list[int] = []
    for operator in order:
        ready_us = [
            (spans_us[p][1] + delay_us, lanes[p]) for p, delay_us in tasks.incoming[operator]
        ]
        duration_us = tasks.durations_us[operator] * contention.duration_factor
        best_us = (0.0, inf)
        for lane in range(min(stream_count, len(last_on) + 1)):
            start_us = spans_us[last_on[lane]][1] if lane < len(last_on) else 0.0
            for us, source in ready_us:
                start_us = max(start_us, us + (contention.event_us if source != lane else 0.0))
            start_us += contention.start_us
            if start_us + duration_us >= best_us[1]:
                continue
            slowdown = 1.0
            for neighbour in last_on[:lane] + last_on[lane + 1 :]:
                if spans_us[neighbour][0] <= start_us < spans_us[neighbour][1]:
                    slowdown += contention.launch_slowdown
                    slowdown += contention.sm_slowdown * tasks.sm_shares[neighbour]
            if start_us + duration_us * slowdown < best_us[1]:
                best_us = (start_us, start_us + duration_us * slowdown)
                lanes[operator] = lane
        spans_us[operator] = best_us
        last_on[lanes[operator] : lanes[operator] + 1] = [operator]
    return list(order), lanes


def _improved(
    graph: OperatorGraph,
    start: Arrangement,
    stream_count: int,
    judge: Callable[[Arrangement], Judgement],
    least_us: float,
) -> Arrangement:
    """The end of a random walk that never goes up; it stops where nothing can be better."""
    rng = random.Random(0)
    best, (makespan_us, spread) = start, judge(start)
    for _ in range(min(10 * len(graph), WORK_LIMIT // max(1, len(graph)))):
        if makespan_us <= least_us and spread <= 1:
            break
        tried = rng.choice(_STEPS)(rng, graph, (best[0].copy(), best[1].copy()), stream_count)
        tried_us, tried_spread = judge(tried)
        gain_us = WORTH * makespan_us if tried_spread > spread else 0.0
        if tried_us <= makespan_us - gain_us:
            best, makespan_us, spread = tried, tried_us, tried_spread
    return best


def _move(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> Arrangement:
    order, lanes = arrangement
    lanes[rng.choice(order)] = rng.randrange(stream_count)
    return order, lanes


def _swap(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> Arrangement:
    order, lanes = arrangement
    one, other = rng.choice(order), rng.choice(order)
    lanes[one], lanes[other] = lanes[other], lanes[one]
    return order, lanes


def _exchange_tails(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> Arrangement:
    """With an unused stream this splits one, and without the way back it merges two."""
    order, lanes = arrangement
    position = rng.randrange(len(order))
    one, other = lanes[order[position]], rng.randrange(stream_count)
    there_and_back = rng.random() < 0.7
    for operator in order[position:]:
        if lanes[operator] == one:
            lanes[operator] = other
        elif lanes[operator] == other and there_and_back:
            lanes[operator] = one
    return order, lanes


def _reorder(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> Arrangement:
    """Anywhere between what an operator reads from and what reads from it."""
    order, lanes = arrangement
    position = rng.randrange(len(order))
    operator = order[position]
    before, after = set(graph.predecessors[operator]), set(graph.successors[operator])
    first = last = position
    while first > 0 and order[first - 1] not in before:
        first -= 1
    while last < len(order) - 1 and order[last + 1] not in after:
        last += 1
    order.insert(rng.randint(first, last), order.pop(position))
    return order, lanes


_STEPS = (_move, _move, _swap, _exchange_tails, _reorder)


def _schedule(
    arrangement: Arrangement, tasks: Tasks, contention: Contention, machine: Machine
) -> Schedule:
    """Launched by simulated start, then finish, which keeps the order of every stream."""
    order, lanes = arrangement
    starts_us, finishes_us = run_tasks(tasks, contention, order, lanes)
    by_start = sorted(order, key=lambda v: (starts_us[v], finishes_us[v]))
    number: dict[int, int] = {}
    return Schedule(
        tuple(
            Slot(v, machine.placements[number.setdefault(lanes[v], len(number))]) for v in by_start
        )
    )
