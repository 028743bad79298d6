"""Improve a schedule by local search, judged by measurements on the machine. Pure but for those.

Predictions rank schedules roughly; a few percent lie in what only the machine knows. A trial
takes some hundredths of a second, so hundreds of neighbours of the best schedules can be tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxsched.graph import OperatorGraph
from onnxsched.schedule import Schedule, Slot
from onnxsched.steps import neighbour
from onnxsched_runtime.device import Placement

Measure = Callable[[Schedule], float]
"""Median time of a schedule in microseconds."""

_MARGIN = 0.998
"""What is less than this much faster may be noise."""
_PATIENCE = 150
"""Trials in a row without an improvement after which a start is given up."""


@dataclass(frozen=True)
class Refined:
    """The best schedule that was found, and how fast it was."""

    schedule: Schedule
    measured_us: float


def refine(
    graph: OperatorGraph,
    start: Schedule,
    placements: Sequence[Placement],
    measure: Measure,
    is_time_left: Callable[[], bool],
    seed: int = 0,
    settle: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Refined:
    """Climb from a schedule to one that no tried neighbour beats.

    Neighbours are one step away (`onnxsched.steps`). One that is measured faster is
    measured once more, and taken if both times together are. What differs from one that was tried
    only in how streams are numbered is not measured again. O(operators) beside each measurement.

    Args:
        graph: What is scheduled.
        start: A schedule of it that passes `check_schedule`.
        placements: The streams that may be used, those of `start` included.
        measure: Runs a schedule.
        is_time_left: Asked before each trial.
        seed: Of the neighbours.
        settle: Makes equal what runs alike.
    """
    generator = random.Random(seed)
    best, best_us = start, measure(start)
    failures = 0
    tried = {start.shape}
    while failures < _PATIENCE and is_time_left():
        neighbour = settle(_neighbour(graph, best, placements, generator))
        failures += 1
        if neighbour.shape in tried:
            continue
        tried.add(neighbour.shape)
        measured_us = measure(neighbour)
        if measured_us < _MARGIN * best_us:
            measured_us = (measured_us + measure(neighbour)) / 2
            if measured_us < _MARGIN * best_us:
                best, best_us, failures = neighbour, measured_us, 0
    return Refined(best, best_us)


def _neighbour(
    graph: OperatorGraph,
    schedule: Schedule,
    placements: Sequence[Placement],
    rng: random.Random,
) -> Schedule:
    """A schedule that differs a little, if at all, and passes `check_schedule`."""
    used = sorted({slot.placement for slot in schedule.slots})
    free = {
        placement.device: placement for placement in reversed(placements) if placement not in used
    }
    tried = [*used, *free.values()]  # all of a device that are not in use are alike
    number = {placement: lane for lane, placement in enumerate(tried)}
    lanes = [number[schedule.placement_of[operator]] for operator in range(len(graph))]
    order = [slot.operator for slot in schedule.slots]
    order, lanes = neighbour(graph, (order, lanes), len(tried), rng)
    return Schedule(tuple(Slot(operator, tried[lanes[operator]]) for operator in order))
