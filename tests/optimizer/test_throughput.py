"""Requests in flight: everyone is served by a session of its own, and all is counted."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from onnxsched import throughput
from onnxsched.throughput import ARMS, COPIES, measure_throughput
from onnxsched_runtime.annotation import write_annotation
from onnxsched_runtime.files import write_model
from onnxsched_runtime.load import Session
from support import models


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = models.fork_join()
    write_annotation(model, models.annotation_of(model, (0, 1), device_count=2))
    write_model(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_every_load_is_measured(path: Path) -> None:
    result = measure_throughput(path, duration_s=0.05)
    in_flight = {arm: [load.in_flight for load in result.loads if load.arm == arm] for arm in ARMS}
    assert in_flight == {
        "schedule": [*COPIES],
        "sequential": [2 * count for count in COPIES],  # on each of two devices
    }
    for load in result.loads:
        assert load.latency.count >= load.in_flight
        busy_s = load.latency.mean_us * load.latency.count / 1e6
        assert busy_s < load.in_flight * load.latency.count / load.requests_per_s * 1.05
    assert result.best.requests_per_s == max(load.requests_per_s for load in result.loads)
    content = result.to_json()
    assert len(content["loads"]) == len(result.loads)
    assert content["loads"][0]["latency"]["count"] > 0


def test_everyone_is_served_once_where_there_is_no_time(path: Path) -> None:
    result = measure_throughput(path, duration_s=0.0)
    assert [load.latency.count for load in result.loads] == [
        load.in_flight for load in result.loads
    ]


def test_requests_are_served_at_the_same_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.run
    inside: set[int] = set()
    most = 0

    def run(self: Session, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        nonlocal most
        inside.add(id(self))
        most = max(most, len(inside))
        threading.Event().wait(0.002)
        results = real(self, names, feeds)
        inside.discard(id(self))
        return results

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(throughput, "COPIES", (4,))
    measure_throughput(path, duration_s=0.1)
    assert most == 8


class Planted(BaseException):
    """What nobody expects."""


@pytest.mark.timeout(60, method="thread")
def test_what_fails_in_one_thread_is_raised_here_and_ends_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, caller, planted = Session.run, threading.current_thread(), Planted()
    calls = itertools.count()
    threads = threading.active_count()

    def run(self: Session, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        if threading.current_thread() is not caller and next(calls) == 9:
            raise planted
        return real(self, names, feeds)

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(throughput, "COPIES", (2,))
    with pytest.raises(Planted) as raised:
        measure_throughput(path, duration_s=1e5)
    assert raised.value is planted
    assert threading.active_count() == threads
