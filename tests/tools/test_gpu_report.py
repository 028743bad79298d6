"""The report of a GPU host, made on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_measure, gpu_report


def report_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    command = ["gpu_report", "--out", str(tmp_path), "--device", "cpu", "--no-tests", *words]
    monkeypatch.setattr(sys, "argv", command)
    gpu_report.main()
    found: dict[str, Any] = json.loads((tmp_path / "zoo.json").read_text())
    return found


def test_each_step_adds_to_what_is_known(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    steps = [set(found) for found in gpu_measure.measured("tiny", "cpu", "keep", 1.0, cache)]
    assert steps == sorted(steps, key=len)
    assert {"policy", "optimize_s", "alternatives"} <= steps[0] < steps[1] < steps[-1]
    assert {"bench", "bounds", "in_processes"} <= steps[-1]
    [again, *_] = gpu_measure.measured("tiny", "cpu", "keep", 1.0, cache)
    assert again["is_profile_cached"]


def test_what_a_model_was_measured_before_it_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise TimeoutError("too slow")

    monkeypatch.setattr(gpu_measure, "bench_command", fail)
    report = report_of(tmp_path, monkeypatch, "--models", "deepfm,nothing", "--budget", "1")
    assert report["environment"]["onnxruntime"]
    assert report["models"]["deepfm"]["error"] == "TimeoutError: too slow"
    assert report["models"]["deepfm"]["policy"]
    assert list(report["models"]["nothing"]) == ["error"]
    assert "TimeoutError: too slow" in capsys.readouterr().out
