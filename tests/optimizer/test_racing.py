"""Sessions are timed in interleaved rounds: launches where one graph is a run, else whole runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxsched.racing import race, require_time, time_runs_us
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.load import Session
from support import fake_cuda, models

GPU = Device("cuda")


class FakeSession:
    """Notes its runs."""

    executor = None

    def __init__(self, name: str, runs: list[str]) -> None:
        self._name, self._runs = name, runs

    def run(self, names: None, feeds: dict[str, int]) -> None:
        assert feeds == {"x": 1}
        self._runs.append(self._name)


def test_rounds_are_interleaved_after_one_run_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what others have used is forgotten before each turn."""
    runs: list[str] = []
    monkeypatch.setattr(cuda, "forget_idle_streams", lambda: runs.append("forgotten"))
    sessions: list[Any] = [FakeSession(name, runs) for name in "ab"]
    steps: list[tuple[str, int, int]] = []
    samples = race(sessions, {"x": 1}, lambda *step: steps.append(step))
    assert runs == [*"ab", *(["forgotten", *["a"] * 7, "forgotten", *["b"] * 7]) * 5]
    assert [len(kept) for kept in samples] == [35, 35]
    assert all(us >= 0 for kept in samples for us in kept)
    assert steps == [("measuring", number, 5) for number in range(5)]


def test_time_is_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1_000, 3_500, 10_000, 10_250])
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(clock))
    assert time_runs_us(lambda: None, 2) == (2.5, 0.25)


@settings(deadline=None)
@given(st.floats())
@example(0.0)
@example(1e6)
@example(math.nextafter(1e6, 0))
@example(-1e-9)
@example(math.nan)
def test_times_are_numbers_from_0_to_a_million(value: float) -> None:
    if 0 <= value < 1e6:
        require_time("--duration", value)
    else:
        with pytest.raises(UsageError, match=r"^--duration takes a number, at least 0 and below"):
            require_time("--duration", value)


@pytest.mark.parametrize(("name", "is_launched"), [("fork_join", True), ("branch", False)])
def test_device_time_of_a_launch_is_taken_where_that_is_all(
    name: str, is_launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = fake_cuda.install(monkeypatch)

    def time_launches_us(stream: fake_cuda.FakeStream, launch: Any, count: int) -> tuple[Any, ...]:
        assert stream.is_open
        for _ in range(count):
            launch()
        return (-1.0,) * count

    monkeypatch.setattr(cuda, "time_launches_us", time_launches_us)
    model = models.MODELS[name]()
    with Session(model, models.annotation_of(model, device=Device("cuda"))) as session:
        (samples,) = race([session], models.feeds_for(model), lambda *step: None)
        pieces = [piece.captured for piece in session.plan.pieces]
        assert (pieces == [True]) == is_launched
        assert graphs.launches == 36 * sum(pieces)
    assert (set(samples) == {-1.0}) == is_launched
