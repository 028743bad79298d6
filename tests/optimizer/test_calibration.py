"""Contention is found again from schedules simulated with it, and stays within its bounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.calibration import TYPICAL, calibrate
from onnxsched.cost import Contention, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import Schedule
from onnxsched.simulate import simulate
from support.graphs import durations, graph_of, layered_problem
from support.strategies import GPU, problems
from support.timing import at_most_cpu_s
from tools.contention_report import predictions

MEASUREMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "h200-contention.json"

STRENGTHS = (
    Contention(0.8, 1.0, 0.0, 0.2, 0.0),
    Contention(1.3, 0.0, 1.5, 0.8, 0.1),
    Contention(1.0, 0.1, 0.3, 0.0, 0.2),
    Contention(),
)


def problem(layer_count: int, width: int) -> tuple[OperatorGraph, TableCost]:
    """Short operators, whose shares are drawn like their blocks'."""
    graph, cost = layered_problem(layer_count, width, seed=5)
    return graph, TableCost(
        tuple(
            replace(o, duration_us=o.duration_us / 5, sm_share=o.block_share)
            for o in cost.operators
        )
    )


def schedules(graph: OperatorGraph, cost: TableCost, policies: list[str]) -> list[Schedule]:
    machines = [Machine((GPU,), streams) for streams in (2, 3, 4, 8)]
    some = [POLICIES[policy](graph, cost, machine) for policy in policies for machine in machines]
    return [POLICIES["sequential"](graph, cost, machines[0]), *some]


@pytest.mark.parametrize("truth", STRENGTHS)
def test_times_of_other_schedules_are_predicted_within_three_percent(truth: Contention) -> None:
    graph, cost = problem(12, 8)
    actual = replace(cost, contention=truth)
    measured = [
        (schedule, simulate(graph, actual, schedule).makespan_us)
        for schedule in schedules(graph, cost, ["wavefront", "nimble"])
    ]
    fitted = replace(cost, contention=calibrate(graph, cost, measured))
    for schedule in schedules(graph, cost, ["heft", "opara"]):
        expected_us = simulate(graph, actual, schedule).makespan_us
        predicted_us = simulate(graph, fitted, schedule).makespan_us
        assert predicted_us == pytest.approx(expected_us, rel=0.03)


@settings(deadline=None, max_examples=100)
@given(
    problem=problems(),
    times_us=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=4),
)
def test_whatever_was_measured_calibration_holds_its_bounds_and_is_deterministic(
    problem: tuple[OperatorGraph, TableCost], times_us: list[float]
) -> None:
    graph, cost = problem
    measured = [
        (POLICIES["wavefront"](graph, cost, Machine((GPU,), streams + 1)), us)
        for streams, us in enumerate(times_us)
    ]
    found = calibrate(graph, cost, measured)  # `Contention` refuses what is out of bounds.
    assert found == calibrate(graph, cost, measured)


def test_nothing_measured_is_typical() -> None:
    assert calibrate(*problem(2, 2), []) == TYPICAL
    assert calibrate(graph_of(0, []), durations(), [(Schedule(()), 3.0)]) == TYPICAL


@pytest.mark.parametrize("us", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(us: float) -> None:
    graph, cost = problem(2, 2)
    schedule = POLICIES["sequential"](graph, cost, Machine((GPU,), 1))
    with pytest.raises(ValueError, match="positive"):
        calibrate(graph, cost, [(schedule, us)])


def test_three_hundred_chains_and_ten_schedules_take_no_three_seconds() -> None:
    graph, cost = problem(30, 10)
    actual = replace(cost, contention=STRENGTHS[1])
    measured = [
        (schedule, simulate(graph, actual, schedule).makespan_us)
        for schedule in schedules(graph, cost, ["wavefront", "heft", "opara"])[:10]
    ]
    with at_most_cpu_s(3.0):
        calibrate(graph, cost, measured)


@pytest.mark.parametrize(
    ("name", "most_error", "least_correlation"),
    [("googlenet", 0.02, 0.975), ("randwire", 0.03, 0.99), ("deepfm", 0.04, 0.97)],
)
def test_schedules_measured_on_an_h200_are_predicted_as_well_as_ever(
    name: str, most_error: float, least_correlation: float
) -> None:
    measurement = json.loads(MEASUREMENT.read_text())
    model = predictions(measurement | {"models": {name: measurement["models"][name]}})
    found = model["models"][name]["predictions"]["calibrated"]
    assert found["mean_absolute_error"] <= most_error
    assert found["rank_correlation"] >= least_correlation
