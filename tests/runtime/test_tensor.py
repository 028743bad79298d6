"""Tensor types know their size and whether a buffer can hold them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnxsched_runtime.tensor import TensorType

BUFFERED = [
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE,
    TensorProto.BOOL, TensorProto.INT8, TensorProto.INT64, TensorProto.UINT16,
    TensorProto.FLOAT8E4M3FN,
]  # fmt: skip


@given(
    element_type=st.sampled_from(BUFFERED),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
)
def test_the_size_is_that_of_the_array(element_type: int, shape: tuple[int, ...]) -> None:
    kind = TensorType(element_type, shape)
    array = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(element_type))
    assert kind.is_static
    assert kind.nbytes == array.nbytes


@pytest.mark.parametrize(
    "kind",
    [
        TensorType(TensorProto.FLOAT, None),
        TensorType(TensorProto.STRING, (2,)),
        TensorType(TensorProto.INT4, (2,)),
        TensorType(TensorProto.COMPLEX64, (2,)),
    ],
)
def test_what_no_buffer_can_hold_is_not_static_and_without_size(kind: TensorType) -> None:
    assert not kind.is_static
    assert kind.nbytes == 0


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (TensorType(TensorProto.FLOAT, (1, 3, 224, 224)), "float[1x3x224x224]"),
        (TensorType(TensorProto.INT64, ()), "int64[]"),
        (TensorType(TensorProto.BOOL, (0,)), "bool[0]"),
        (TensorType(TensorProto.FLOAT16, None), "float16[?]"),
    ],
)
def test_it_prints_as_people_write_it(kind: TensorType, text: str) -> None:
    assert str(kind) == text
