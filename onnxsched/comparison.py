"""Compare what two models compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Run = Callable[[Mapping[str, np.ndarray]], list[Any]]
"""Runs a model on feeds and returns its outputs in order."""


@dataclass(frozen=True)
class Tolerances:
    """How far outputs may differ: |a - b| <= absolute + relative x |b|, for every element.

    Where no absolute tolerance is given it is the relative one times the largest |b|, so that
    elements that cancel to nearly zero do not decide. Integers, booleans and strings are equal,
    but of an output with a relative tolerance of its own that share may differ.
    """

    relative: float = 1e-3
    absolute: float | None = None
    relative_of: Mapping[str, float] = field(default_factory=dict)
    """By output name, over `relative`."""
    absolute_of: Mapping[str, float] = field(default_factory=dict)
    """By output name, over `absolute`."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output of two models is apart, at worst over all runs."""

    output: str
    max_absolute: float
    relative: float
    """Norm of the difference over the norm of the expected values."""
    is_within: bool
    is_identical: bool

    def worse(self, other: Difference) -> Difference:
        """Both taken together."""
        return Difference(
            self.output,
            max(self.max_absolute, other.max_absolute),
            max(self.relative, other.relative),
            self.is_within and other.is_within,
            self.is_identical and other.is_identical,
        )


def compare(
    run: Run,
    expected: Run,
    outputs: Sequence[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    tolerances: Tolerances,
) -> tuple[Difference, ...]:
    """Run two models on the same feeds and compare every output.

    Args:
        run: The model in question.
        expected: The model that is right.
        outputs: Names of the outputs, in the order both return them.
        feeds: Inputs of each run; they should differ, since a stale buffer shows only then.
        tolerances: How far outputs may differ.
    """
    worst: dict[str, Difference] = {}
    for feed in feeds:
        for name, a, b in zip(outputs, run(feed), expected(feed), strict=True):
            found = difference(name, a, b, tolerances)
            worst[name] = found.worse(worst.get(name, found))
    return tuple(worst.values())


def difference(name: str, actual: Any, expected: Any, tolerances: Tolerances) -> Difference:
    """Compare one output; NaN equals NaN, and another shape or type is infinitely far."""
    if isinstance(expected, list):
        return _sequence_difference(name, actual, expected, tolerances)
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return Difference(name, float("inf"), float("inf"), False, False)
        actual, expected = [actual[key] for key in expected], list(expected.values())
        return difference(name, np.array(actual), np.array(expected), tolerances)
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(name, float("inf"), float("inf"), False, False)
    if not np.issubdtype(b.dtype, np.floating):
        share = float(np.mean(a != b)) if a.size else 0.0
        return Difference(
            name,
            float("inf") if share else 0.0,
            share,
            share <= tolerances.relative_of.get(name, 0.0),
            share == 0.0,
        )
    relative = tolerances.relative_of.get(name, tolerances.relative)
    absolute = tolerances.absolute_of.get(name, tolerances.absolute)
    with np.errstate(invalid="ignore", over="ignore"):
        gap, scale = _gap(a.astype(np.float64), b.astype(np.float64))
        largest = float(scale.max(initial=0.0))
        if absolute is None:
            absolute = relative * largest
        unit = largest or 1.0
        norm = float(np.linalg.norm(scale / unit)) or 1.0
        return Difference(
            name,
            float(gap.max(initial=0.0)),
            float(np.linalg.norm(gap / unit)) / norm,
            bool((gap <= absolute + relative * scale).all()),
            bool(np.array_equal(a, b, equal_nan=True)),
        )


def _gap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each element is apart, and the size of what is expected where that is finite."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0.0, np.abs(a - b))
    return np.where(np.isnan(gap), np.inf, gap), np.where(np.isfinite(b), np.abs(b), 0.0)


def _sequence_difference(
    name: str, actual: Any, expected: list[Any], tolerances: Tolerances
) -> Difference:
    if not isinstance(actual, list) or len(actual) != len(expected):
        return Difference(name, float("inf"), float("inf"), False, False)
    worst = Difference(name, 0.0, 0.0, True, True)
    for a, b in zip(actual, expected, strict=True):
        worst = worst.worse(difference(name, a, b, tolerances))
    return worst
