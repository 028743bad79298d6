"""What is tuned, and what came of it, as values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxsched.candidates import Candidate
from onnxsched.contraction import Contraction
from onnxsched.cost import TableCost
from onnxsched.loading import AS_LOADED, Form, Model
from onnxsched.recomputing import Duplicate


@dataclass(frozen=True)
class Subject:
    """A variant of a portable model, and the schedules proposed for it."""

    portable: Model
    """Rewritten or as it was loaded: what is annotated."""
    model: Model
    """The same lowered."""
    contraction: Contraction
    cost: TableCost
    """Of the lowered model's operators."""
    candidates: tuple[Candidate, ...]
    """Their schedules are of the portable model, the contracted ones of `contraction`."""
    operators: Mapping[str, tuple[float, str]]
    """Median solo time in microseconds and bound, by node name of the portable model."""
    refusals: Mapping[str, str]
    """Why a node can't be captured, for those where the attempt failed."""
    duplicates: tuple[Duplicate, ...] = ()
    """What the portable model computes twice, where it was rewritten so."""


@dataclass(frozen=True)
class Outcome:
    """A candidate and what it took on the machine."""

    candidate: Candidate
    trial_us: float | None = None
    """Median time from captured chains, or over several devices as it will run; None where it was
    not tried."""
    samples_us: tuple[float, ...] = ()
    """Times as it will run, from rounds interleaved with the other finalists."""
    form: Form = AS_LOADED
    """Of the subject that it is a schedule of."""

    @property
    def measured_us(self) -> float | None:
        """Median time as it will run; None for a candidate that was no finalist."""
        return statistics.median(self.samples_us) if self.samples_us else None


@dataclass(frozen=True)
class Tuned:
    """What tuning came to."""

    outcomes: tuple[Outcome, ...]
    """The fastest finalist first, candidates that were no finalist last."""
    is_complete: bool
    """False where Ctrl-C ended it early."""


def subject_of(outcome: Outcome, subjects: Sequence[Subject]) -> Subject:
    """What a candidate is a schedule of."""
    return next(subject for subject in subjects if subject.model.form == outcome.form)


def expected(outcome: Outcome) -> tuple[bool, float]:
    """By what to rank what was tried, and behind it what was not."""
    if outcome.trial_us is None:
        return (True, outcome.candidate.predicted_us)
    return (False, outcome.trial_us)
