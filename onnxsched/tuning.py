"""Choose among candidates by measuring them on the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from onnxsched.annotate import annotation_for
from onnxsched.candidates import Candidate
from onnxsched.contraction import Contraction
from onnxsched.inputs import random_inputs
from onnxsched.loading import Model
from onnxsched.profiling.measure import Progress
from onnxsched.trial import TrialRunner
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.load import Session

_FINALIST_COUNT = 3
"""Candidates that are built as they will run, beside sequential."""
_ROUND_COUNT = 7
_RUNS_A_ROUND = 5


@dataclass(frozen=True)
class Outcome:
    """A candidate and what it took on the machine."""

    candidate: Candidate
    trial_us: float | None = None
    """Median device time from one session a chain; None where it was not tried so."""
    samples_us: tuple[float, ...] = ()
    """Times as it will run, from rounds interleaved with the other finalists."""

    @property
    def measured_us(self) -> float | None:
        """Median time as it will run; None for a candidate that was no finalist."""
        return statistics.median(self.samples_us) if self.samples_us else None


def tune(
    model: Model,
    contraction: Contraction,
    candidates: Sequence[Candidate],
    device: Device,
    *,
    budget_s: float,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> tuple[Outcome, ...]:
    """Measure candidates and rank them.

    All are tried in the order of their predictions while the budget lasts (on a GPU, where the
    model is captured whole); the best few and the sequential one are then built as they will
    run and measured in interleaved rounds.

    Returns:
        Every outcome, the fastest finalist first, candidates that were no finalist last.
    """
    deadline = time.monotonic() + budget_s
    outcomes = [Outcome(candidate) for candidate in candidates]
    if device.kind == "cuda" and not model.host_reasons and len(candidates) > 2:
        outcomes = _try_all(model, contraction, outcomes, device, deadline, custom_ops, progress)
    ranked = sorted(outcomes, key=_expected)
    others = [o for o in ranked if o.candidate.policy != "sequential"]
    sequential = [o for o in ranked if o.candidate.policy == "sequential"]
    finalists = [*sequential, *others[:_FINALIST_COUNT]]
    measured = _measure_finalists(model, finalists, device, custom_ops, progress)
    measured.sort(key=lambda outcome: statistics.median(outcome.samples_us))
    return (*measured, *others[_FINALIST_COUNT:])


def _expected(outcome: Outcome) -> tuple[bool, float]:
    if outcome.trial_us is None:
        return (True, outcome.candidate.predicted_us)
    return (False, outcome.trial_us)


def _try_all(
    model: Model,
    contraction: Contraction,
    outcomes: Sequence[Outcome],
    device: Device,
    deadline: float,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> list[Outcome]:
    tried = sorted(outcomes, key=_expected)
    progress("preparing trials", 0, len(tried))
    with TrialRunner(model, contraction, device, custom_ops) as runner:
        for index, outcome in enumerate(tried):
            if time.monotonic() > deadline:
                break
            progress("trying schedules", index, len(tried))
            try:
                samples_us = runner.measure_us(outcome.candidate.contracted)
            except CaptureError:
                break
            tried[index] = replace(outcome, trial_us=statistics.median(samples_us))
    return tried


def _measure_finalists(
    model: Model,
    finalists: Sequence[Outcome],
    device: Device,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> list[Outcome]:
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    samples: list[list[float]] = [[] for _ in finalists]
    with ExitStack() as stack:
        runs = []
        for number, outcome in enumerate(finalists):
            progress("building finalists", number, len(finalists))
            annotation = annotation_for(model, outcome.candidate.schedule)
            session = Session(model.proto, annotation, custom_ops=custom_ops)
            stack.callback(session.close)
            runs.append(_timed_run(session, feeds))
        for number in range(_ROUND_COUNT):
            progress("measuring finalists", number, _ROUND_COUNT)
            for run, kept in zip(runs, samples, strict=True):
                kept += run(_RUNS_A_ROUND)
    return [
        replace(outcome, samples_us=tuple(kept))
        for outcome, kept in zip(finalists, samples, strict=True)
    ]


def _timed_run(session: Session, feeds: dict[str, Any]) -> Callable[[int], tuple[float, ...]]:
    """What takes a number of samples: device time of one launch, else time of a whole run."""
    session.run(None, feeds)
    executor = session.executor
    if isinstance(executor, StreamExecutor) and executor.is_one_piece:
        return lambda count: cuda.time_launches_us(executor.main_stream, executor.launch, count)
    return lambda count: time_runs_us(lambda: session.run(None, feeds), count)


def time_runs_us(run: Callable[[], Any], count: int) -> tuple[float, ...]:
    """Time of a whole run as the caller sees it, one sample a run."""
    samples = []
    for _ in range(count):
        start_ns = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start_ns) / 1e3)
    return tuple(samples)
