"""Transfer curves: what was measured on H200s, and what any curve keeps to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import TableCost
from onnxsched.transfer import NVLINK, TransferCurve, curve_from_samples
from onnxsched_runtime.device import Device
from support.graphs import linear
from support.strategies import GPU, curves

SIZES = st.integers(0, 1 << 34)
SAMPLES = st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0, 1e6)), min_size=1, max_size=20)
MIB = 1 << 20


def gb_per_s(nbytes: int) -> float:
    return nbytes / NVLINK.us(nbytes) / 1000


def test_the_default_is_what_two_h200s_do() -> None:
    assert all(8.7 <= NVLINK.us(nbytes) <= 10.0 for nbytes in (4 << 10, 64 << 10, MIB))
    assert NVLINK.us(16 * MIB) == 53.0
    assert 316 < gb_per_s(16 * MIB) < 318
    assert all(391 <= gb_per_s(nbytes * MIB) <= 396 for nbytes in (256, 1024, 4096))


@given(curve=curves(), one=SIZES, other=SIZES)
def test_more_bytes_take_no_less_time(curve: TransferCurve, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert curve.us(small) <= curve.us(large) or curve.us(small) == pytest.approx(curve.us(large))


@given(curve=curves())
def test_a_curve_goes_through_its_points(curve: TransferCurve) -> None:
    assert [curve.us(nbytes) for nbytes, _ in curve.points] == [us for _, us in curve.points]


def test_between_and_beyond_points() -> None:
    curve = TransferCurve(((100, 2.0), (300, 6.0)), is_peer=False)
    assert [curve.us(nbytes) for nbytes in (0, 50, 200, 600)] == [2.0, 2.0, 4.0, 12.0]


@given(samples=SAMPLES)
def test_a_curve_lies_within_its_samples(samples: list[tuple[int, float]]) -> None:
    curve = curve_from_samples(samples, is_peer=True)
    times_us = [us for _, us in samples]
    assert [nbytes for nbytes, _ in curve.points] == sorted({nbytes for nbytes, _ in samples})
    assert curve.points[0][1] >= min(times_us) or curve.points[0][1] == pytest.approx(
        min(times_us)
    )
    assert curve.points[-1][1] <= max(times_us) * (1 + 1e-9)


@given(curve=curves())
def test_samples_on_a_curve_give_it_back(curve: TransferCurve) -> None:
    assert curve_from_samples(curve.points[::-1] * 3, is_peer=True) == curve


@settings(deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 10**6), st.floats(0, 1000, allow_subnormal=False), min_size=1, max_size=9
    )
)
def test_no_curve_that_never_falls_is_closer(medians: dict[int, float]) -> None:
    """To be closest is to rise only where what is left on both sides adds up to nothing."""
    curve = curve_from_samples(medians.items(), is_peer=True)
    left_us = 0.0
    times = [us for _, us in curve.points]
    for (nbytes, us), next_us in zip(curve.points, [*times[1:], math.inf], strict=True):
        left_us += medians[nbytes] - us
        assert left_us >= -1e-6
        if next_us > us * (1 + 1e-9):
            assert left_us == pytest.approx(0.0, abs=1e-6)


def test_medians_are_taken_and_falling_times_levelled() -> None:
    samples = [(1, 4.0), (1, 900.0), (1, 3.0), (2, 9.0), (4, 7.0), (8, 10.0)]
    curve = curve_from_samples(samples, is_peer=False)
    assert curve.points == ((1, 4.0), (2, 8.0), (4, 8.0), (8, 10.0))


@pytest.mark.parametrize(
    "points", [(), ((0, 1.0),), ((-1, 1.0), (2, 2.0)), ((1, 2.0), (1, 3.0)), ((1, 2.0), (2, 1.0))]
)
def test_a_curve_that_does_not_rise_is_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"no points|no bandwidth|does not rise"):
        TransferCurve(points, is_peer=True)


def test_each_direction_has_its_own_curve() -> None:
    there, third = Device("cuda", 1), Device("cuda", 2)
    cost = TableCost((), transfers={(GPU, there): linear(1.0, 1.0)}, unmeasured=linear(5.0, 1.0))
    assert cost.transfer_us(2, GPU, there) == 3.0
    assert cost.transfer_us(2, there, GPU) == 7.0
    assert cost.transfer_us(2, GPU, third) == 7.0
    assert cost.transfer_us(2, third, third) == 0.0
