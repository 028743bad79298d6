"""What no schedule can be shorter than."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnxsched
from onnxsched.profiling import measure
from onnxsched_runtime.device import Device
from sample_models import build
from support.optimizing import saved
from tools.bounds import bounds_us


def test_the_longest_way_and_the_sum_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = saved(build("googlenet", image=64), tmp_path), tmp_path / "out.onnx"
    cache = tmp_path / "cache"
    onnxsched.optimize(source, target, device="cpu:0", cache_dir=cache, policy="heft")
    monkeypatch.delattr(measure, "_time_on_cpu")
    found = bounds_us(target, Device("cpu", 0), cache)
    assert 0 < found["critical_path_us"] < found["operator_sum_us"]
    assert found["sm_time_us"] == 0
