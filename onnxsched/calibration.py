"""Fit the contention of a machine to schedules measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, log, sqrt

import numpy as np
import numpy.typing as npt

from onnxsched.cost import Contention, CostModel
from onnxsched.fluid import Tasks, run_tasks
from onnxsched.graph import OperatorGraph
from onnxsched.schedule import Schedule
from onnxsched.simulate import tasks_on
from onnxsched_runtime.device import Placement

_TYPICAL = np.array([1.05, 0.3, 0.5, 0.5, 0.05])
TYPICAL = replace(Contention(*map(float, _TYPICAL)), link_share=1.0)
"""Near what most models on an H200 calibrate to: for predictions before anything is measured."""

_WIDTHS = np.array([0.4, 0.5, 0.5, 0.3, 0.05])
"""How far from `TYPICAL` each field may well be."""
_LEAST = np.array([0.05, 0.0, 0.0, 0.0, 0.0])
_HOLD = 3e-4
"""What a field that is so far off adds to the mean squared relative error."""
_ROUND_COUNT = 10
_PROBE = 0.05
"""The step of the numeric derivatives, in widths."""
_DAMPINGS = (0.0, 1e-3, 1e-1)

_Vector = npt.NDArray[np.float64]


def calibrate(
    graph: OperatorGraph, cost: CostModel, measured: Sequence[tuple[Schedule, float]]
) -> Contention:
    """The contention with which simulated times come nearest to measured ones.

    Least squares of the logarithms of predicted over measured times, held near `TYPICAL` so that
    a few schedules are enough, by Gauss-Newton steps within the bounds, damped (Levenberg, 1944)
    where a full one does not help. Deterministic. At most 81 simulations of every schedule.

    Args:
        graph: What was scheduled: for trials the chains, since each start costs.
        cost: Of the same graph; its own contention does not matter.
        measured: Schedules with their times in microseconds. One of a single stream tells how
            long work takes alone, the others what running beside others costs.

    Returns:
        The contention; `TYPICAL` where nothing was measured.

    Raises:
        ValueError: A measured time is not positive and finite.
    """
    if not all(0 < us < inf for _, us in measured):
        raise ValueError("measured times must be positive and finite")
    kept = [(_prepared(graph, cost, schedule), us) for schedule, us in measured if schedule.slots]
    if not kept:
        return TYPICAL

    def residuals(fields: _Vector) -> _Vector:
        contention = _contention(fields)
        errors = [
            log(max(max(run_tasks(tasks, contention, order, lanes)[1]), 1e-9) / us)
            for (tasks, order, lanes), us in kept
        ]
        held = sqrt(_HOLD) * (fields - _TYPICAL) / _WIDTHS
        return np.concatenate([np.array(errors) / sqrt(len(kept)), held])

    return _contention(_least_squares(residuals))


def _prepared(
    graph: OperatorGraph, cost: CostModel, schedule: Schedule
) -> tuple[Tasks, list[int], list[Placement]]:
    """Tasks, launch order and streams, to be run many times."""
    lanes = [schedule.placement_of[operator] for operator in range(len(graph))]
    tasks = tasks_on(graph, cost, [placement.device for placement in lanes])
    return tasks, [slot.operator for slot in schedule.slots], lanes


def _least_squares(residuals: Callable[[_Vector], _Vector]) -> _Vector:
    """The fields, from the typical ones on, where the squares sum to the least.

    A field at its bound that would leave it takes no part in a step.
    """
    fields = _TYPICAL
    current = residuals(fields)
    for _ in range(_ROUND_COUNT):
        probes = [residuals(fields + _PROBE * width) - current for width in np.diag(_WIDTHS)]
        jacobian = np.stack(probes, axis=1) / _PROBE
        descent = -jacobian.T @ current
        movable = (fields > _LEAST) | (descent > 0)
        normal = (jacobian.T @ jacobian)[np.ix_(movable, movable)]
        for damping in _DAMPINGS:
            step = np.zeros_like(fields)
            damped = normal + damping * np.diag(np.diag(normal))
            step[movable] = np.linalg.solve(damped, descent[movable])
            moved = _within_bounds(fields + step * _WIDTHS)
            found = residuals(moved)
            if found @ found < (current @ current) * (1 - 1e-4):
                fields, current = moved, found
                break
        else:
            break
    return fields


def _within_bounds(fields: _Vector) -> _Vector:
    bounded: _Vector = np.maximum(fields, _LEAST)
    bounded[3:] /= max(1.0, float(bounded[3:].sum()) * (1 + 1e-12))
    return bounded


def _contention(fields: _Vector) -> Contention:
    fitted = Contention(*map(float, _within_bounds(fields)))
    return replace(fitted, link_share=TYPICAL.link_share)
