"""The simulator study measures what it says, and its page holds its numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.reachability import levels
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device, Placement
from tools.device_plots import plot_study
from tools.device_study import ROOT, Point, averaged, by_value, json_text, points, table
from tools.synthetic_graphs import hios_problem

RESULTS = json.loads((ROOT / "docs" / "benchmarks" / "device-study.json").read_text())["results"]
GPUS = Machine((Device("cuda", 0), Device("cuda", 1)), 2)


@settings(deadline=None, max_examples=50)
@given(
    operator_count=st.integers(1, 80),
    edge_count=st.integers(0, 300),
    layers=st.integers(1, 80),
    ratio=st.sampled_from([0.1, 0.8, 3.2]),
    seed=st.integers(0, 2**32),
)
def test_graphs_are_as_asked_for_and_the_same_again(
    operator_count: int, edge_count: int, layers: int, ratio: float, seed: int
) -> None:
    layer_count = min(layers, operator_count)
    graph, cost = hios_problem(operator_count, edge_count, layer_count, ratio, seed)
    assert (graph, cost) == hios_problem(operator_count, edge_count, layer_count, ratio, seed)
    assert len(graph) == operator_count
    assert max(levels(graph)) == layer_count - 1
    needed = sum(1 for level in levels(graph) if level)
    assert len(graph.edges) <= max(edge_count, needed)
    assert len({(e.producer, e.consumer) for e in graph.edges}) == len(graph.edges)
    for edge in graph.edges:
        transfer_us = cost.transfer_us(edge.nbytes, *GPUS.devices)
        expected_us = ratio * cost.operators[edge.consumer].duration_us
        assert transfer_us == pytest.approx(expected_us, abs=0.001)


def test_a_stage_of_two_takes_what_hios_says() -> None:
    """Half the sum of the durations, and half the sum of durations times shares."""
    graph, cost = hios_problem(2, 0, 1, 0.8)
    twin = replace(cost.operators[0], duration_us=100.0)
    cost = replace(cost, operators=(twin, twin))
    pair = OperatorGraph(graph.operators, ())
    together = Schedule(tuple(Slot(v, Placement(Device("cuda"), v)) for v in (0, 1)))
    assert simulate(pair, cost, together).makespan_us == pytest.approx(
        0.5 * 200 + 0.5 * 200 * twin.sm_share
    )


def test_results_are_averaged_written_drawn_and_tabled(tmp_path: Path) -> None:
    small = Point("devices", 2, 2, operator_count=12, edge_count=20, layer_count=4)
    cells = Point("duration", 8, 2, operator_count=12, median_us=8)
    results = [averaged(point, 2) for point in (small, cells, replace(small, sweep="size"))]
    assert [r["graphs"] for r in results] == [2, 2, 1]
    assert json.loads(json_text({"results": results})) == {"results": results}
    search = results[0]["policies"]["search"]["speedup"]
    assert by_value(results, "devices", "speedup")[2]["search"] == search
    assert "| devices | 2 |" in table(results)
    plot_study(results, tmp_path / "plot.svg")
    assert "communication to computation" in (tmp_path / "plot.svg").read_text()


def test_the_committed_results_are_complete_and_keep_what_policies_promise() -> None:
    settings_of = [(r["sweep"], r["value"]) for r in RESULTS]
    assert settings_of == [(p.sweep, p.value) for p in points([1000, 3000, 10_000])]
    for result in RESULTS:
        speedup = {label: entry["speedup"] for label, entry in result["policies"].items()}
        assert max(speedup.values()) <= result["longest_path"] + 0.001
        for name in ("heft", "search"):
            assert speedup[name] >= speedup[f"{name} alone"] - 0.001
        assert speedup["search"] >= speedup["heft"] - 0.001
        if result["operator_count"] == 10_000:
            assert all(entry["cpu_s"] < 10 for entry in result["policies"].values())
        else:
            assert speedup["search"] >= speedup["hios-lp"] - 0.001


def test_the_page_holds_the_table_of_the_committed_results() -> None:
    assert table(RESULTS) in (ROOT / "docs" / "several-devices.md").read_text()
