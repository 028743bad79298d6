"""The shortest schedule that there is, with a proof: what policies are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError


@dataclass(frozen=True)
class ExactSchedule:
    """The shortest schedule found, and how short any can be."""

    schedule: Schedule
    makespan_us: float
    """As `simulate` predicts it."""
    lower_bound_us: float
    """No schedule is shorter."""
    is_optimal: bool
    """Whether it is proven that no schedule is shorter, with times rounded down to nanoseconds."""


@dataclass(frozen=True)
class _Problem:
    """A question and its answer in variables of the constraint programme `model`."""

    graph: OperatorGraph
    cost: CostModel
    machine: Machine
    model: Any
    start_ns: list[Any]
    runs_on: list[dict[Placement, Any]]
    """For each operator and placement whether it runs there."""
    runs_at: list[dict[Device, Any]]
    """For each operator and device whether it runs there."""

    def duration_ns(self, operator: int, device: Device) -> int:
        """Of an operator on a device."""
        return _nanoseconds(self.cost.operator(operator, device).duration_us)


def exact(
    graph: OperatorGraph, cost: CostModel, machine: Machine, *, time_limit_s: float = 60.0
) -> ExactSchedule:
    """The schedule with the smallest makespan on the streams of all devices, without contention.

    A constraint programme for OR-Tools' CP-SAT (Perron and Didier): an optional interval for each
    operator on each stream, no two intervals of a stream overlap, and a tensor arrives before it
    is read. Streams of a device are alike, so they are opened in the order of the operators.
    Times are integers, nanoseconds rounded down; so the bound holds, and the makespan is within
    a nanosecond per operator and transfer of the least. One thread and a fixed seed: the same
    question has the same answer, unless the time limit ends the search. Exponential: for up to
    some twenty operators.

    Args:
        graph: The operators.
        cost: Their durations, and how long transfers take.
        machine: Devices and streams.
        time_limit_s: When to stop looking, above 0.

    Raises:
        UsageError: OR-Tools is not installed, or the time limit is not above 0.
    """
    if not time_limit_s > 0:
        raise UsageError(f"A time limit of {time_limit_s} s is too short; give more than 0.")
    cp = _constraint_programming()
    problem = _problem(cp, graph, cost, machine)
    _run_one_at_a_time(problem)
    _wait_for_tensors(problem)
    _open_streams_in_order(problem)
    solver = cp.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_time_in_seconds = time_limit_s
    status = solver.solve(problem.model)
    if status in (cp.OPTIMAL, cp.FEASIBLE):
        schedule = _schedule(solver, problem)
    else:  # The time limit came before any schedule.
        first = machine.placements[0]
        schedule = Schedule(tuple(Slot(operator, first) for operator in range(len(graph))))
    return ExactSchedule(
        schedule,
        makespan_us=simulate(graph, cost, schedule).makespan_us,
        lower_bound_us=max(0.0, solver.best_objective_bound) / 1000,
        is_optimal=status == cp.OPTIMAL,
    )


def _constraint_programming() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise UsageError(
            "Exact schedules need OR-Tools, which is not installed; "
            "install it with pip install ortools."
        ) from None
    return cp_model


def _nanoseconds(us: float) -> int:
    return math.floor(us * 1000)


def _problem(cp: Any, graph: OperatorGraph, cost: CostModel, machine: Machine) -> _Problem:
    """Variables for a start and a placement of each operator; all on one stream is enough time."""
    model = cp.CpModel()
    first = machine.devices[0]
    horizon_ns = sum(_nanoseconds(cost.operator(v, first).duration_us) for v in range(len(graph)))
    start_ns = [model.new_int_var(0, horizon_ns, "") for _ in range(len(graph))]
    runs_on = [{p: model.new_bool_var("") for p in machine.placements} for _ in range(len(graph))]
    runs_at = [{d: model.new_bool_var("") for d in machine.devices} for _ in range(len(graph))]
    problem = _Problem(graph, cost, machine, model, start_ns, runs_on, runs_at)
    makespan_ns = model.new_int_var(0, horizon_ns, "")
    model.minimize(makespan_ns)
    for v, choices in enumerate(runs_at):
        model.add_exactly_one(choices.values())
        for device, is_here in choices.items():
            model.add(sum(runs_on[v][p] for p in runs_on[v] if p.device == device) == is_here)
            finish_ns = start_ns[v] + problem.duration_ns(v, device)
            model.add(finish_ns <= makespan_ns).only_enforce_if(is_here)
    return problem


def _run_one_at_a_time(problem: _Problem) -> None:
    """No two operators of a stream overlap.

    That a device runs no more at once than it has streams follows from it, and speeds proofs up.
    """
    machine, model = problem.machine, problem.model

    def intervals(device: Device, is_here: Sequence[Any]) -> list[Any]:
        return [
            model.new_optional_fixed_size_interval_var(
                start_ns, problem.duration_ns(v, device), is_here[v], ""
            )
            for v, start_ns in enumerate(problem.start_ns)
        ]

    for placement in machine.placements:
        on_stream = [choices[placement] for choices in problem.runs_on]
        model.add_no_overlap(intervals(placement.device, on_stream))
    for device in machine.devices:
        at_device = intervals(device, [choices[device] for choices in problem.runs_at])
        model.add_cumulative(at_device, [1] * len(at_device), machine.stream_count)


def _wait_for_tensors(problem: _Problem) -> None:
    """An operator starts once all tensors that it reads have arrived."""
    model, devices = problem.model, problem.machine.devices
    for edge in problem.graph.edges:
        for source, target in product(devices, repeat=2):
            transfer_ns = _nanoseconds(problem.cost.transfer_us(edge.nbytes, source, target))
            arrival_ns = problem.start_ns[edge.producer] + transfer_ns
            arrival_ns += problem.duration_ns(edge.producer, source)
            model.add(arrival_ns <= problem.start_ns[edge.consumer]).only_enforce_if(
                problem.runs_at[edge.producer][source], problem.runs_at[edge.consumer][target]
            )


def _open_streams_in_order(problem: _Problem) -> None:
    """An operator is on a stream only where an earlier one is on the stream before.

    Streams of a device are alike; this leaves one of all ways to number them.
    """
    for device in problem.machine.devices:
        for stream in range(1, problem.machine.stream_count):
            here, before = Placement(device, stream), Placement(device, stream - 1)
            for v, choices in enumerate(problem.runs_on):
                earlier = [others[before] for others in problem.runs_on[:v]]
                problem.model.add_bool_or([*earlier, ~choices[here]])


def _schedule(solver: Any, problem: _Problem) -> Schedule:
    """Launch by start, then finish: the order of every stream, and a topological one.

    A consumer starts no earlier than its producer finishes; where all times are equal, the
    producer has the lower index.
    """
    timed = []
    for v, choices in enumerate(problem.runs_on):
        [placement] = [p for p, is_here in choices.items() if solver.boolean_value(is_here)]
        start_ns = solver.value(problem.start_ns[v])
        finish_ns = start_ns + problem.duration_ns(v, placement.device)
        timed.append((start_ns, finish_ns, v, placement))
    timed.sort(key=lambda entry: entry[:3])
    return Schedule(tuple(Slot(v, placement) for _, _, v, placement in timed))
