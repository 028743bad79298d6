"""What travels between processes arrives as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto

from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.group.values import empty, packed, raw, unpacked
from onnxsched_runtime.tensor import TensorType

KINDS = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    np.int64: TensorProto.INT64,
    np.bool_: TensorProto.BOOL,
}
values = st.sampled_from(list(KINDS)).flatmap(
    lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0, max_dims=3))
)


def is_same(one: Any, other: Any) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@given(value=values, is_turned=st.booleans())
def test_an_array_of_known_shape(value: np.ndarray, is_turned: bool) -> None:
    value = value.T if is_turned else value
    arrived = empty(TensorType(KINDS[value.dtype.type], value.shape))
    raw(arrived)[:] = raw(value)
    assert is_same(arrived, value)


@given(value=values)
def test_an_array_of_unknown_shape(value: np.ndarray) -> None:
    assert is_same(unpacked(packed("t", value)), value)


@given(value=st.lists(values, max_size=12))
def test_a_sequence(value: list[np.ndarray]) -> None:
    arrived = unpacked(packed("t", value))
    assert len(arrived) == len(value)
    assert all(map(is_same, arrived, value))


@pytest.mark.parametrize("value", [np.array(["text"], object), None])
def test_what_has_no_bytes_is_refused(value: Any) -> None:
    with pytest.raises(ModelError, match="'t' is no tensor of numbers"):
        packed("t", value)
