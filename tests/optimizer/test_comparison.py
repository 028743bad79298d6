"""What counts as equal, and how far apart the rest is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxsched.comparison import Difference, Tolerances, compare, difference
from support.models import Array

EXACT = Tolerances(relative=0.0, absolute=0.0)
INF, NAN = float("inf"), float("nan")


def apart(actual: Any, expected: Any, tolerances: Tolerances = EXACT) -> Difference:
    return difference("y", actual, expected, tolerances)


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 5), elements=st.floats(width=32)))
def test_everything_equals_itself(array: Array) -> None:
    assert apart(array, array.copy()) == Difference("y", 0.0, 0.0, True, True)


@pytest.mark.parametrize(
    "expected",
    [
        np.array([1.0, NAN, INF, -INF]),
        np.array([], np.float32),
        np.array(2.0),
        np.array([1, 2], np.int64),
        np.array([True, False]),
        np.array(["a", "b"], object),
        [np.array([1.0]), np.array([[2.0, NAN]])],
        [],
        None,
    ],
)
def test_equal_values_of_every_kind_are_identical(expected: Any) -> None:
    assert apart(expected, expected) == Difference("y", 0.0, 0.0, True, True)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.array([1.0, NAN]), np.array([1.0, 2.0])),
        (np.array([1.0, 2.0]), np.array([1.0, NAN])),
        (np.array([INF]), np.array([-INF])),
        (np.array([INF]), np.array([1.0])),
        (np.array([1.0]), np.array([INF])),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(3), np.zeros(())),
        (np.zeros(3, np.float32), np.zeros(3, np.float64)),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([True]), np.array([False])),
        (np.array(["a"], object), np.array(["b"], object)),
        ([np.zeros(2)], [np.zeros(2), np.zeros(2)]),
        ([np.zeros(2)], [np.zeros(3)]),
        (np.zeros(2), [np.zeros(2)]),
    ],
)
def test_no_tolerance_helps_values_of_another_kind(actual: Any, expected: Any) -> None:
    found = apart(actual, expected, Tolerances(relative=1e9, absolute=1e9))
    assert found.max_absolute == INF
    assert not found.is_within
    assert not found.is_identical


def test_a_difference_has_its_size() -> None:
    found = apart(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    assert found == Difference("y", 0.5, 0.1, False, False)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=1, max_size=5),
    st.integers(-900, 900),
)
def test_how_far_apart_is_no_matter_of_the_unit(pairs: list[tuple[int, int]], power: int) -> None:
    actual, expected = np.array(pairs, np.float64).T
    found = apart(np.ldexp(actual, power), np.ldexp(expected, power))
    assert found.is_identical == (actual == expected).all()
    if expected.any():
        assert found.relative == pytest.approx(apart(actual, expected).relative)


def test_huge_values_are_compared_too() -> None:
    assert not apart(np.array([1.5e308]), np.array([-1.5e308])).is_within
    assert not apart(np.array([1e300]), np.array([-1e300])).is_within


@pytest.mark.parametrize(
    ("tolerances", "within"),
    [
        (Tolerances(relative=0.0, absolute=0.5), True),
        (Tolerances(relative=0.0, absolute=0.49), False),
        (Tolerances(relative=0.125, absolute=0.0), True),
        (Tolerances(relative=0.12, absolute=0.0), False),
        (Tolerances(relative=0.0, absolute=0.0, absolute_of={"y": 0.5}), True),
        (Tolerances(relative=0.0, absolute=0.0, absolute_of={"z": 0.5}), False),
        (Tolerances(relative=9.0, absolute=0.0, relative_of={"y": 0.1}), False),
        (Tolerances(relative=0.0, absolute=0.0, relative_of={"y": 0.125}), True),
    ],
)
def test_tolerances_are_taken_by_name_first(tolerances: Tolerances, within: bool) -> None:
    found = apart(np.array([3.0, 4.5]), np.array([3.0, 4.0]), tolerances)
    assert found.is_within is within


def test_values_near_zero_are_judged_by_the_largest() -> None:
    expected, actual = np.array([100.0, 1e-9]), np.array([100.0, 0.05])
    assert apart(actual, expected, Tolerances(relative=1e-3)).is_within
    assert not apart(actual, expected, Tolerances(relative=1e-3, absolute=0.0)).is_within


def test_a_sequence_is_as_far_as_its_worst_element() -> None:
    expected = [np.array([1.0]), np.array([2.0]), np.array([4.0])]
    actual = [np.array([1.0]), np.array([3.0]), np.array([4.5])]
    assert apart(actual, expected) == Difference("y", 1.0, 0.5, False, False)


def test_maps_are_compared_by_what_they_hold() -> None:
    expected = [{"a": 1.0, "b": np.nan}, {"a": 4.0, "b": 2.0}]
    assert apart([dict(one) for one in expected], expected).is_identical
    actual = [{"a": 1.0, "b": np.nan}, {"b": 2.0, "a": 4.5}]
    found = apart(actual, expected)
    assert (found.max_absolute, found.is_within, found.is_identical) == (0.5, False, False)
    assert apart(actual, expected, Tolerances(relative=0.2)).is_within
    for other in ({"a": 1.0}, {"a": 1.0, "c": 2.0}, [1.0, 2.0], {"a": "x", "b": "y"}):
        found = apart(other, expected[1], Tolerances(relative=1e9, absolute=1e9))
        assert (found.max_absolute, found.is_within) == (INF, False)


def test_the_worst_of_all_runs_counts() -> None:
    def actual(feed: Mapping[str, Array]) -> list[Any]:
        return [feed["x"] + (feed["x"] == 2), feed["x"] * 2]

    def expected(feed: Mapping[str, Array]) -> list[Any]:
        return [feed["x"], feed["x"] * 2]

    feeds = [{"x": np.array([value])} for value in (1.0, 2.0, 4.0)]
    found = compare(actual, expected, ["a", "b"], feeds, EXACT)
    assert found == (
        Difference("a", 1.0, 0.5, False, False),
        Difference("b", 0.0, 0.0, True, True),
    )
