"""Time sessions as they will run, in interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxsched.profiling.measure import Progress
from onnxsched_runtime import cuda
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.load import Session

_ROUND_COUNT = 5
_RUNS_A_ROUND = 7


def race(
    sessions: Sequence[Session], feeds: Mapping[str, Any], progress: Progress
) -> list[tuple[float, ...]]:
    """Samples of each session's time in microseconds, all from the same rounds.

    Device time of one launch where a run is one CUDA graph, else time of a whole run.
    """
    runs = [timed_run(session, feeds) for session in sessions]
    samples: list[list[float]] = [[] for _ in sessions]
    for number in range(_ROUND_COUNT):
        progress("measuring", number, _ROUND_COUNT)
        for run, kept in zip(runs, samples, strict=True):
            kept += run(_RUNS_A_ROUND)
    return [tuple(kept) for kept in samples]


def timed_run(session: Session, feeds: Mapping[str, Any]) -> Callable[[int], tuple[float, ...]]:
    """What takes so many samples of a session's time, after a first run."""
    session.run(None, feeds)
    executor = session.executor
    if isinstance(executor, StreamExecutor) and executor.is_one_piece:
        return lambda count: cuda.time_launches_us(executor.main_stream, executor.launch, count)
    return lambda count: time_runs_us(lambda: session.run(None, feeds), count)


def require_time(option: str, value: float) -> None:
    """Check how long something is to be measured, in whatever unit.

    Raises:
        UsageError: It is negative, no number or has no end.
    """
    if not 0 <= value < 1e6:
        raise UsageError(f"{option} takes a number, at least 0 and below a million.")


def time_runs_us(run: Callable[[], Any], count: int) -> tuple[float, ...]:
    """Time of a whole run as the caller sees it, one sample a run.

    Idle streams are forgotten before, within `cuda.other_contexts`.
    """
    cuda.forget_idle_streams()
    samples = []
    for _ in range(count):
        start_ns = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start_ns) / 1e3)
    return tuple(samples)
