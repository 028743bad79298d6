"""The scale benchmark measures what it says, and its committed results keep what was promised."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from onnxsched.policies import POLICIES
from tools.plots import plot_scale
from tools.scheduler_scale import ROOT, json_text, measure, measure_all, steps, table
from tools.synthetic_graphs import FAMILIES, synthetic_problem

RESULTS = ROOT / "docs" / "benchmarks" / "scheduler-scale.json"


@pytest.mark.parametrize("step", steps())
def test_a_step_is_measured_without_what_prepares_it(step: str) -> None:
    assert {*POLICIES, "propose", "check"} <= set(steps())
    measured = measure(synthetic_problem("nasnet", 50), steps()[step])
    assert 0 <= measured["cpu_s"] < 10
    assert measured["memory_mib"] >= 0


def test_a_step_over_its_limit_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'runtime'}")
    monkeypatch.setattr("tools.scheduler_scale.steps", lambda: dict.fromkeys(["contract"]))
    stopped = measure_all("layered", 100_000, argparse.Namespace(limit=0.05))
    assert stopped == {"contract": {"over_s": 0.05}}
    measured = measure_all("layered", 10, argparse.Namespace(limit=60))
    assert set(measured["contract"]) == {"cpu_s", "memory_mib"}


def test_results_are_written_drawn_and_tabled(tmp_path: Path) -> None:
    entries = [{"cpu_s": 1.5, "memory_mib": 2.0}, {"over_s": 60}]
    report = {
        "results": [
            {"family": "layered", "operators": size, "steps": {"heft": entry}}
            for size, entry in zip((10, 100), entries, strict=True)
        ]
    }
    assert json.loads(json_text(report)) == report
    assert table(report).splitlines()[1].split() == ["heft", "1.50", "over", "60"]
    plot_scale(report, tmp_path / "plot.svg")
    assert "layered" in (tmp_path / "plot.svg").read_text()


def test_the_committed_results_keep_the_limits_at_ten_thousand_operators() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    large = {r["family"]: r["steps"] for r in results if r["operators"] == 10_000}
    assert set(large) == set(FAMILIES)
    for measured in large.values():
        assert all(entry["cpu_s"] < 10 for step, entry in measured.items() if step != "propose")
        assert measured["propose"]["cpu_s"] < 30
