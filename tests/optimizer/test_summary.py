"""Summaries of times against examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.summary import Summary, ratio, summarize

times = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=50)
rounds = st.lists(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=4), min_size=1, max_size=8)


def test_a_summary_of_a_hundred_samples() -> None:
    found = summarize([float(us) for us in range(101)])
    variation = float(np.std(np.arange(101)) / 50)
    assert found == Summary(101, 0.0, 50.0, 50.0, 90.0, 95.0, 99.0, 100.0, variation)


def test_one_sample_is_its_own_summary() -> None:
    assert summarize([4.0]) == Summary(1, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 0.0)


@settings(deadline=None)
@given(times)
def test_percentiles_are_in_order(samples_us: list[float]) -> None:
    found = summarize(samples_us)
    ordered = [found.min_us, found.median_us, found.p90_us, found.p95_us, found.p99_us]
    assert ordered == sorted(ordered)
    assert found.p99_us <= found.max_us == max(samples_us)


def test_a_ratio_is_that_of_the_medians() -> None:
    found = ratio([[4.0, 6.0], [8.0]], [[2.0, 3.0], [4.0]])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_a_drift_that_both_share_does_not_widen_the_interval() -> None:
    drift = [1.0, 3.0, 9.0, 2.0, 5.0]
    shared = ratio([[2 * us] for us in drift], [[us] for us in drift])
    assert shared.low == shared.value == shared.high == pytest.approx(2.0)
    unshared = ratio([[2 * us] for us in drift], [[3.0]] * 5)
    assert unshared.low < unshared.value < unshared.high


@settings(deadline=None)
@given(rounds)
def test_nothing_is_faster_than_itself(samples_us: list[list[float]]) -> None:
    found = ratio(samples_us, samples_us)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


@settings(deadline=None)
@given(rounds)
def test_equal_samples_have_equal_intervals(samples_us: list[list[float]]) -> None:
    other = [[2.0] for _ in samples_us]
    found = ratio(samples_us, other)
    assert found == ratio(samples_us, other)
    assert found.low <= found.high
