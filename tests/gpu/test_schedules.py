"""Scheduled models on a GPU compute what one ONNX Runtime session computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnxsched
from onnxsched.inputs import random_inputs
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.files import read_model
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource

Zoo = Callable[[str], Path]
Scheduled = Callable[[str], onnxsched.OptimizeResult]
_CUDA = Device("cuda")
_NAMES = ["googlenet", "squeezenet", "deepfm"]


@pytest.fixture(scope="module")
def scheduled(zoo: Zoo, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scheduled:
    """Optimize a model of the zoo once; returns the path and the result."""
    folder = tmp_path_factory.mktemp("scheduled")
    done: dict[str, onnxsched.OptimizeResult] = {}

    def optimized(name: str) -> onnxsched.OptimizeResult:
        if name not in done:
            target = folder / f"{name}.onnx"
            done[name] = onnxsched.optimize(
                zoo(name),
                target,
                device="cuda:0",
                policy="heft",
                streams=4,
                variants=False,
                cache_dir=cache_dir,
                budget_s=4.0,
            )
        return done[name]

    return optimized


def _plain(path: Path, device: Device = _CUDA) -> OrtSession:
    """One session of plain ORT on the annotated model."""
    model = read_model(path)
    source = ModelSource(model, read_annotation(model).tensors)
    return OrtSession(source.whole(), SessionSettings(device))


def _feeds(path: Path, seed: int) -> dict[str, np.ndarray]:
    model = read_model(path)
    return random_inputs(model, read_annotation(model).tensors, seed)


@pytest.mark.parametrize("name", _NAMES)
def test_streams_change_no_bit(scheduled: Scheduled, name: str) -> None:
    result = scheduled(name)
    assert result.capture == "whole"
    assert result.stream_count > 1
    assert all(difference.is_identical for difference in result.differences)


@pytest.mark.parametrize("name", ["googlenet", "deepfm"])
def test_a_thousand_replays_stay_right(scheduled: Scheduled, name: str) -> None:
    path = scheduled(name).path
    base = _feeds(path, 0)
    with onnxsched.load(path) as session, _plain(path) as plain:
        for seed in range(1000):
            feeds = _redrawn(base, seed)
            for a, b in zip(session.run(None, feeds), plain.run(feeds), strict=True):
                np.testing.assert_array_equal(a, b)


def _redrawn(base: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Other floats of the same shapes; indices stay in range as they are."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(a.shape).astype(a.dtype) if a.dtype.kind == "f" else a
        for name, a in base.items()
    }


@pytest.mark.parametrize("capture", ["ort", "none"])
def test_every_way_to_capture_gives_the_same_numbers(scheduled: Scheduled, capture: str) -> None:
    path = scheduled("googlenet").path
    with (
        onnxsched.load(path) as whole,
        onnxsched.load(path, capture=capture) as other,  # type: ignore[arg-type]
    ):
        assert (whole.capture, other.capture) == ("whole", capture)
        assert other.refusal is None
        for seed in range(5):
            feeds = _feeds(path, seed)
            for a, b in zip(whole.run(None, feeds), other.run(None, feeds), strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_refused_capture_falls_back_and_says_why(
    scheduled: Scheduled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = scheduled("squeezenet").path
    feeds = _feeds(path, 1)
    with onnxsched.load(path) as session:
        expected = session.run(None, feeds)

    def refuse(stream: object, issue: object, marks: object = None) -> cuda.Chain:
        raise CaptureError("The capture was refused (planted).")

    monkeypatch.setattr(cuda.Chain, "capture", refuse)
    with onnxsched.load(path) as session:
        assert session.capture == "ort"
        assert session.refusal is not None
        assert "planted" in session.refusal
        np.testing.assert_array_equal(session.run(None, feeds)[0], expected[0])


def test_the_whole_model_is_one_cuda_graph(scheduled: Scheduled) -> None:
    with onnxsched.load(scheduled("googlenet").path) as session:
        assert isinstance(session.executor, StreamExecutor)
        assert session.executor.is_one_piece
        assert session.executor.graph_count == 1
        assert session.plan.wait_count > 0


def test_an_annotated_model_runs_anywhere(
    scheduled: Scheduled,
) -> None:
    path = scheduled("googlenet").path
    feeds = _feeds(path, 3)
    with onnxsched.load(path) as session, _plain(path) as on_gpu:
        expected = session.run(None, feeds)[0]
        np.testing.assert_array_equal(on_gpu.run(feeds)[0], expected)
    scale = float(np.abs(expected).max())
    with _plain(path, Device("cpu")) as on_cpu:
        np.testing.assert_allclose(on_cpu.run(feeds)[0], expected, atol=5e-3 * scale)
    with onnxsched.load(path, device_map={"cuda:0": "cpu:0"}) as threads:
        np.testing.assert_allclose(threads.run(None, feeds)[0], expected, atol=5e-3 * scale)


def test_optimizing_again_from_the_cache_gives_the_same_schedule(
    zoo: Zoo,
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    first = onnxsched.optimize(zoo("deepfm"), tmp_path / "a.onnx", cache_dir=cache, budget_s=4.0)
    second = onnxsched.optimize(zoo("deepfm"), tmp_path / "b.onnx", cache_dir=cache, budget_s=4.0)
    assert (first.from_cache, second.from_cache) == (False, True)
    annotations = [read_annotation(read_model(r.path)) for r in (first, second)]
    assert list(annotations[0].placements.items()) == list(annotations[1].placements.items())


def test_auto_is_not_slower_than_one_stream(
    zoo: Zoo,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    result = onnxsched.optimize(
        zoo("googlenet"), tmp_path / "a.onnx", cache_dir=cache_dir, budget_s=4.0
    )
    assert result.sequential_us is not None
    assert result.measured_us <= result.sequential_us
