"""Timelines against an example worked by hand and against networkx."""

from __future__ import annotations

from hypothesis import given, settings

from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, critical_path_us, simulate, total_us
from onnxsched_runtime.device import Device, Placement
from support import oracles
from support.graphs import durations, graph_of, linear
from support.strategies import GPU, problems

DIAMOND = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
COST = durations(1.0, 4.0, 2.0, 8.0, unmeasured=linear(0.5, 1.0))


def timeline_on(*placements: Placement) -> Timeline:
    return simulate(DIAMOND, COST, Schedule(tuple(map(Slot, range(4), placements))))


def test_a_stream_runs_one_operator_after_another() -> None:
    timeline = timeline_on(*[Placement(GPU, 0)] * 4)
    assert timeline == Timeline((0.0, 1.0, 5.0, 7.0), (1.0, 5.0, 7.0, 15.0))
    assert timeline.makespan_us == 15.0


def test_streams_of_a_device_overlap_and_wait_for_tensors() -> None:
    first, second = Placement(GPU, 0), Placement(GPU, 1)
    timeline = timeline_on(first, first, second, second)
    assert timeline == Timeline((0.0, 1.0, 1.0, 5.0), (1.0, 5.0, 3.0, 13.0))


def test_a_tensor_takes_time_between_devices() -> None:
    here, there = Placement(GPU, 0), Placement(Device("cuda", 1), 0)
    timeline = timeline_on(here, here, there, there)
    assert timeline == Timeline((0.0, 1.0, 2.5, 6.5), (1.0, 5.0, 4.5, 14.5))


def test_nothing_takes_no_time() -> None:
    nothing = graph_of(0, [])
    assert simulate(nothing, durations(), Schedule(())).makespan_us == 0.0
    assert critical_path_us(nothing, durations(), GPU) == 0.0
    assert total_us(nothing, durations(), GPU) == 0.0


@settings(deadline=None)
@given(problem=problems())
def test_critical_path_equals_networkx(problem: tuple[OperatorGraph, TableCost]) -> None:
    graph, cost = problem
    assert critical_path_us(graph, cost, GPU) == oracles.critical_path_us(graph, cost, GPU)
