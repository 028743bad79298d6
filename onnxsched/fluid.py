"""Run tasks on streams, and slow those that run at the same time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from onnxsched.cost import Contention
from onnxsched.links import Send

Lanes = Sequence[Hashable]
"""The stream of each task."""
Times = tuple[list[float], list[float]]
"""Start and finish of each task in microseconds."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is to run, by index: all that does not depend on streams."""

    durations_us: Sequence[float]
    """Alone."""
    sm_shares: Sequence[float]
    devices: Sequence[int]
    """Only tasks of one device slow each other."""
    incoming: Sequence[Sequence[tuple[int, float]]]
    """For each task those that it waits for, and for how long beyond their finish."""
    ready_us: Sequence[float]
    """When each can start at the earliest, whatever it waits for."""
    sends: Sequence[Sequence[Send]] = ()
    """For each task what it sends over links, in this order once it has finished; those who wait
    for that do so for longer, where the link is busy. None where links carry all at once."""


def run_tasks(tasks: Tasks, contention: Contention, order: Sequence[int], lanes: Lanes) -> Times:
    """When each task starts and finishes.

    A task can start once the one before it on its stream has finished and all that it waits for
    has arrived; see `Contention` for what follows.

    Args:
        tasks: The tasks.
        contention: What they cost each other.
        order: The launch order: every task once, after those that it waits for.
        lanes: The stream of each.
    """
    if contention.slows or any(tasks.sends):
        return _run_together(tasks, contention, order, lanes)
    return _run_apart(tasks, contention, order, lanes)


def _run_apart(tasks: Tasks, contention: Contention, order: Sequence[int], lanes: Lanes) -> Times:
    """Without slow-downs the launch order is enough. O(n + edges)."""
    starts_us = [0.0] * len(order)
    finishes_us = [0.0] * len(order)
    free_us: dict[Hashable, float] = {}
    for task in order:
        lane = lanes[task]
        can_start_us = max(tasks.ready_us[task], free_us.get(lane, 0.0))
        for producer, delay_us in tasks.incoming[task]:
            if lanes[producer] != lane:
                delay_us += contention.event_us
            can_start_us = max(can_start_us, finishes_us[producer] + delay_us)
        starts_us[task] = can_start_us + contention.start_us
        duration_us = tasks.durations_us[task] * contention.duration_factor
        finishes_us[task] = free_us[lane] = starts_us[task] + duration_us
    return starts_us, finishes_us


def _run_together(
    tasks: Tasks, contention: Contention, order: Sequence[int], lanes: Lanes
) -> Times:
    """From one start or finish to the next. O(edges + n * (log n + tasks that run at once))."""
    by_count = contention.launch_slowdown
    own = [contention.sm_slowdown * share for share in tasks.sm_shares]
    followers, missing = _followers(tasks, contention, order, lanes)
    can_start_us = list(tasks.ready_us)
    starts_us, finishes_us = [0.0] * len(order), [0.0] * len(order)
    waiting = sorted(
        (can_start_us[task] + contention.start_us, task) for task in order if not missing[task]
    )
    devices, device_count = tasks.devices, max(tasks.devices, default=0) + 1
    running: list[list[int]] = [[] for _ in range(device_count)]
    slowdowns, next_us = [1.0] * len(order), [inf] * device_count
    free_us: dict[int, float] = {}
    while waiting or any(running):
        now_us = min(next_us)
        if waiting and waiting[0][0] < now_us:
            now_us = waiting[0][0]
        changed = {device for device, us in enumerate(next_us) if us <= now_us}
        for device in changed:
            done = [task for task in running[device] if finishes_us[task] <= now_us]
            running[device] = [task for task in running[device] if finishes_us[task] > now_us]
            for task in done:
                if tasks.sends and tasks.sends[task]:
                    _queue(tasks.sends[task], now_us, can_start_us, free_us, followers[task])
                for ready in _released(followers[task], now_us, can_start_us, missing):
                    heappush(waiting, (can_start_us[ready] + contention.start_us, ready))
        while waiting and waiting[0][0] <= now_us:
            start_us, task = heappop(waiting)
            starts_us[task] = start_us
            finishes_us[task] = now_us + tasks.durations_us[task] * contention.duration_factor
            running[devices[task]].append(task)
            changed.add(devices[task])
        for device in changed:
            crowd = running[device]
            next_us[device] = _paced(crowd, own, by_count, slowdowns, finishes_us, now_us)
    return starts_us, finishes_us


def _paced(
    running: Sequence[int],
    own: Sequence[float],
    by_count: float,
    slowdowns: list[float],
    finishes_us: list[float],
    now_us: float,
) -> float:
    """Tell the tasks of a device when they finish if no other comes or goes; the first of that."""
    crowd = 1.0 - by_count
    for task in running:
        crowd += own[task] + by_count
    first_us = inf
    for task in running:
        slowdown = crowd - own[task]
        finish_us = now_us + (finishes_us[task] - now_us) * slowdown / slowdowns[task]
        slowdowns[task], finishes_us[task] = slowdown, finish_us
        if finish_us < first_us:
            first_us = finish_us
    return first_us


def _queue(
    sends: Iterable[Send],
    now_us: float,
    can_start_us: list[float],
    free_us: dict[int, float],
    followers: Iterable[tuple[int, float]],
) -> None:
    """Let tensors wait for their links, and whoever reads them for as long."""
    delay_us = dict(followers)
    for link, busy_us, readers in sends:
        start_us = max(now_us, free_us.get(link, 0.0))
        free_us[link] = start_us + busy_us
        for reader in readers:
            can_start_us[reader] = max(can_start_us[reader], start_us + delay_us[reader])


def _released(
    followers: Iterable[tuple[int, float]],
    now_us: float,
    can_start_us: list[float],
    missing: list[int],
) -> Iterator[int]:
    """Tell the followers of a task that it has finished: those that wait for no other."""
    for follower, delay_us in followers:
        can_start_us[follower] = max(can_start_us[follower], now_us + delay_us)
        missing[follower] -= 1
        if not missing[follower]:
            yield follower


def _followers(
    tasks: Tasks, contention: Contention, order: Sequence[int], lanes: Lanes
) -> tuple[list[list[tuple[int, float]]], list[int]]:
    """Who waits for each task and for how long beyond it, and for how many each one waits."""
    followers: list[list[tuple[int, float]]] = [[] for _ in order]
    missing = [0] * len(order)
    last_on: dict[Hashable, int] = {}
    for task in order:
        lane = lanes[task]
        if lane in last_on:
            followers[last_on[lane]].append((task, 0.0))
            missing[task] += 1
        last_on[lane] = task
        missing[task] += len(tasks.incoming[task])
        for producer, delay_us in tasks.incoming[task]:
            if lanes[producer] != lane:
                delay_us += contention.event_us
            followers[producer].append((task, delay_us))
    return followers, missing
