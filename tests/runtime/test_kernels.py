"""Which kernel is the fastest for a convolution is written and read whole, and damage is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsched_runtime.kernels import (
    PLAIN,
    FusedConvolution,
    Kernels,
    Pool,
    kernels_from_json,
    kernels_to_json,
)
from support.fused import kernels

WHAT = FusedConvolution(
    1, (1, 3, 8, 8), (4, 3, 3, 3), (1, 4, 8, 8), (1, 1), (1, 1), (1, 1, 1, 1), True, False, True
)
FIELDS = [
    1, [1, 3, 8, 8], [4, 3, 3, 3], [1, 4, 8, 8], [1, 1], [1, 1], [1, 1, 1, 1], True, False, True,
]  # fmt: skip
KERNEL = [[47], [3, 2], [8, 0]]
POOL = Pool(1, (1, 3, 8, 8), (1, 3, 4, 4), (3, 3), (2, 2), (1, 1, 0, 0), True, False)
POOL_FIELDS = ["pool", 1, [1, 3, 8, 8], [1, 3, 4, 4], [3, 3], [2, 2], [1, 1, 0, 0], True, False]


@given(known=kernels())
def test_what_is_written_is_read(known: Kernels) -> None:
    assert kernels_from_json(json.loads(json.dumps(kernels_to_json(known)))) == known


def test_it_is_written_field_by_field() -> None:
    known: Kernels = {WHAT: ((47,), (3, 2), (8, 0))}
    assert json.loads(json.dumps(kernels_to_json(known))) == [[FIELDS, KERNEL]]
    assert kernels_from_json([[FIELDS, KERNEL]]) == known


def test_a_pool_is_marked_as_one() -> None:
    known: Kernels = {POOL: PLAIN}
    assert json.loads(json.dumps(kernels_to_json(known))) == [[POOL_FIELDS, [[-1]]]]
    assert kernels_from_json([[POOL_FIELDS, [[-1]]]]) == known


@pytest.mark.parametrize(
    "content",
    [
        None, 3, "47", [1], [[]], [[FIELDS]], [[FIELDS, KERNEL, KERNEL]], [[FIELDS, None]],
        [[FIELDS, 47]], [[FIELDS, [["a"]]]], [[FIELDS, [[None]]]], [[None, KERNEL]],
        [[FIELDS[:-1], KERNEL]], [[[*FIELDS, 1], KERNEL]], [[[{}, *FIELDS[1:]], KERNEL]],
        [[[1, [None], *FIELDS[2:]], KERNEL]], [[FIELDS, [[float("inf")]]]],
        [[POOL_FIELDS[1:], KERNEL]], [[[*POOL_FIELDS, 1], KERNEL]], [["pool", KERNEL]],
        [[{"pool": 1}, KERNEL]], [[FIELDS, []]],
        [[FIELDS, [[]]]], [[FIELDS, [[1, 2]]]], [[FIELDS, [[1], [2]]]],
        [[FIELDS, [[1], [2, 3, 4]]]], [[FIELDS, [[1], [[2], 3]]]], [[FIELDS, [[2**63]]]],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_something_else_is_refused(content: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        kernels_from_json(content)


@given(
    place=st.integers(0, len(FIELDS) - 1),
    stranger=st.sampled_from([None, "text", 1.5, {}, {"a": 1}, [1.5], ["text"], [None]]),
)
def test_a_field_is_numbers_and_nothing_else(place: int, stranger: Any) -> None:
    fields = [*FIELDS[:place], stranger, *FIELDS[place + 1 :]]
    with pytest.raises((TypeError, ValueError)):
        kernels_from_json([[fields, KERNEL]])
