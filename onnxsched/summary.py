"""Summaries of measured times. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLE_COUNT = 2000


@dataclass(frozen=True, slots=True)
class Summary:
    """The distribution of a time."""

    count: int
    min_us: float
    mean_us: float
    median_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    max_us: float
    variation: float
    """Standard deviation over mean."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one thing is than another, with a 95 % confidence interval."""

    value: float
    low: float
    high: float


def summarize(samples_us: Sequence[float]) -> Summary:
    """Summarize at least one sample."""
    values = np.asarray(samples_us, dtype=np.float64)
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    return Summary(
        count=len(values),
        min_us=float(values.min()),
        mean_us=float(values.mean()),
        median_us=float(p50),
        p90_us=float(p90),
        p95_us=float(p95),
        p99_us=float(p99),
        max_us=float(values.max()),
        variation=float(values.std() / values.mean()),
    )


def ratio(slower_us: Sequence[Sequence[float]], faster_us: Sequence[Sequence[float]]) -> Ratio:
    """The speed-up between two arms of interleaved rounds.

    The value is the ratio of the medians over all samples. The interval is a bootstrap over
    rounds, which keeps what drifted together in one round together.

    Args:
        slower_us: Samples of the baseline, one sequence a round.
        faster_us: Samples of the other arm, in the same rounds.
    """
    generator = np.random.default_rng(0)
    top = np.array([np.median(samples) for samples in slower_us])
    bottom = np.array([np.median(samples) for samples in faster_us])
    picks = generator.integers(0, len(top), (_RESAMPLE_COUNT, len(top)))
    resampled = np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = np.median(np.concatenate(slower_us)) / np.median(np.concatenate(faster_us))
    return Ratio(float(value), float(low), float(high))
