"""Host values as bytes that travel. Pure."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx

from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.tensor import TensorType

_Bytes = np.ndarray
"""One dimension of uint8."""


def raw(value: Any) -> _Bytes:
    """The bytes of an array, which may be the array's own."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def empty(kind: TensorType) -> np.ndarray:
    """An array of a static type, to be filled."""
    return np.empty(kind.shape or (), onnx.helper.tensor_dtype_to_np_dtype(kind.element_type))


def packed(name: str, value: Any) -> _Bytes:
    """A value whose shape the other side does not know: an array, or a sequence of them.

    Raises:
        ModelError: It is none of these, or holds strings.
    """
    arrays = value if isinstance(value, list) else [value]
    file = io.BytesIO()
    try:
        np.savez(file, *arrays, allow_pickle=False)
    except ValueError as error:
        raise ModelError(
            f"'{name}' is no tensor of numbers, so it can't go to another process; place what "
            "reads it on the device of what writes it."
        ) from error
    head = np.array([isinstance(value, list)], np.uint8)
    return np.concatenate([head, np.frombuffer(file.getbuffer(), np.uint8)])


def unpacked(content: _Bytes) -> Any:
    """What `packed` was given."""
    with np.load(io.BytesIO(content[1:].tobytes()), allow_pickle=False) as file:
        arrays = [file[name] for name in file.files]
    return arrays if content[0] else arrays[0]
