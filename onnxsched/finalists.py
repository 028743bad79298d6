"""The best candidates, built as they will run and raced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from onnxsched.annotate import annotation_for
from onnxsched.inputs import model_inputs
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome, Subject, subject_of
from onnxsched.profiling.measure import Progress
from onnxsched.racing import race
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.load import Session


def measure_finalists(
    subjects: Sequence[Subject],
    finalists: Sequence[Outcome],
    machine: Machine,
    custom_ops: tuple[str, ...],
    is_time_left: Callable[[], bool],
    progress: Progress,
) -> list[Outcome]:
    """Race the finalists that can be built while there is time, and in any case the first two.

    Over several devices the first three, of which one is on a single device.

    Where memory is limited, those that can be held at the same time.
    """
    first = subjects[0].portable
    feeds = model_inputs(first, seed=0)
    with ExitStack() as stack:
        built: list[tuple[Outcome, Session]] = []
        for number, outcome in enumerate(finalists):
            if len(built) > min(len(machine.devices), 2) and not is_time_left():
                break
            progress("building finalists", number, len(finalists))
            try:
                session = session_of(subject_of(outcome, subjects), outcome, custom_ops)
            except OnnxschedError:
                if not machine.is_limited or (not built and outcome is finalists[-1]):
                    raise
                continue
            stack.callback(session.close)
            built.append((outcome, session))
        samples = race([session for _, session in built], feeds, progress)
    return [
        replace(outcome, samples_us=kept)
        for (outcome, _), kept in zip(built, samples, strict=True)
    ]


def session_of(subject: Subject, outcome: Outcome, custom_ops: tuple[str, ...]) -> Session:
    """A candidate as it will run."""
    variant, _ = outcome.form
    return Session(
        subject.portable.proto,
        annotation_for(subject.portable, outcome.candidate.schedule, variant),
        custom_ops=custom_ops,
        lowered=subject.model.source,
    )
