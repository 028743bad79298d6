"""A worker that dies costs the operator it announced, and nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import onnx
import pytest

from onnxsched.loading import Model
from onnxsched.profiling.isolation import ProfilingWorker
from onnxsched.shapes import tensor_types
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError, OnnxschedError
from support import models

_PROFILE = {"samples_us": [1.0], "kernels": [], "refusal": None}


def _model() -> tuple[Model, list[onnx.NodeProto]]:
    proto = models.diamond()
    return Model(proto, tensor_types(proto), {}, {}, proto), list(proto.graph.node)


def _measure(
    monkeypatch: pytest.MonkeyPatch, lives: list[list[dict[str, Any]]]
) -> tuple[list[tuple[str, str | None]], list[list[str]]]:
    """Measure with workers that say what `lives` lists; returns results, and what was asked."""
    asked: list[list[str]] = []

    def said(worker: ProfilingWorker, request: dict[str, Any]) -> Iterator[Any]:
        asked.append(list(request["names"]))
        yield from lives.pop(0)

    monkeypatch.setattr(ProfilingWorker, "_messages", said)
    model, nodes = _model()
    with ProfilingWorker() as worker:
        results = list(worker.measure(model, Device("cuda"), nodes, ()))
    return [(name, profile.refusal) for name, profile in results], asked


def _done(name: str) -> list[dict[str, Any]]:
    return [{"name": name}, {"name": name, "profile": _PROFILE}]


def test_every_operator_comes_back_from_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [node.name for node in _model()[1]]
    results, asked = _measure(monkeypatch, [[m for name in names for m in _done(name)]])
    assert results == [(name, None) for name in names]
    assert asked == [names]


def test_the_announced_operator_is_refused_and_a_new_worker_takes_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c, d = (node.name for node in _model()[1])
    lives = [[*_done(a), {"name": b}], [{"name": b}], [*_done(c), *_done(d)]]
    results, asked = _measure(monkeypatch, lives)
    assert [name for name, _ in results] == [a, b, c, d]
    refusals = dict(results)
    assert "ends the process" in (refusals[b] or "")
    assert [refusals[name] for name in (a, c, d)] == [None] * 3
    assert asked == [[a, b, c, d], [b, c, d], [c, d]]


def test_an_operator_that_a_second_worker_survives_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c, d = (node.name for node in _model()[1])
    lives = [[*_done(a), {"name": b}], [*_done(b), {"name": c}], [*_done(c), *_done(d)]]
    results, _ = _measure(monkeypatch, lives)
    assert results == [(name, None) for name in (a, b, c, d)]


def test_a_worker_that_is_asked_to_end_blames_no_operator() -> None:
    ended_by = signal.SIGTERM  # others may be ignored from the start, under nohup for one
    model, nodes = _model()
    with ProfilingWorker() as worker:
        process = worker._process
        threading.Timer(0.5, process.send_signal, (ended_by,)).start()
        process.send_signal(signal.SIGSTOP)  # so that it answers nothing before
        threading.Timer(0.6, process.send_signal, (signal.SIGCONT,)).start()
        with pytest.raises(OnnxschedError, match=f"was ended by {ended_by.name}; run"):
            list(worker.measure(model, Device("cuda"), nodes, ()))


def test_a_worker_that_dies_before_any_capture_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match="may not run on this GPU"):
        _measure(monkeypatch, [[]])


def test_what_the_worker_complains_of_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    message = {"error": "Device cuda:0 is not available.", "kind": "DeviceError"}
    with pytest.raises(DeviceError, match="cuda:0 is not available"):
        _measure(monkeypatch, [[message]])


@pytest.mark.skipif(cuda.device_count() > 0, reason="a GPU answers; tests/gpu covers that")
def test_a_real_worker_reports_that_there_is_no_gpu_and_takes_another_request() -> None:
    model, nodes = _model()
    with ProfilingWorker() as worker:
        for _ in range(2):
            with pytest.raises(DeviceError, match="cuda:0 is not available"):
                list(worker.measure(model, Device("cuda"), nodes, ()))
            assert worker._process.poll() is not None
        assert list(worker.measure(model, Device("cuda"), [], ())) == []
