"""Tensor types as the runtime needs them: element type, static shape, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import TensorProto

_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E5M2: 8,
}
"""Element types that can live in a device buffer, with their size in bits."""


def fits_no_memory(shape: Iterable[int]) -> bool:
    """Whether a tensor of a shape is larger than any memory; a size of 0 counts as 1."""
    return math.prod(size or 1 for size in shape) >= 2**60


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a tensor."""

    element_type: int
    """ONNX element type, e.g. `TensorProto.FLOAT`."""
    shape: tuple[int, ...] | None
    """None where the shape is not known before the run."""

    @property
    def is_static(self) -> bool:
        """Whether it can have a buffer of fixed address and size."""
        return self.shape is not None and self.element_type in _BITS

    @property
    def item_nbytes(self) -> int:
        """Size of one number in bytes."""
        return _BITS[self.element_type] // 8

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 where it is not static."""
        if self.shape is None:
            return 0
        return math.prod(self.shape) * _BITS.get(self.element_type, 0) // 8

    def __str__(self) -> str:
        name = TensorProto.DataType.Name(self.element_type).lower()
        return f"{name}[{'?' if self.shape is None else 'x'.join(map(str, self.shape))}]"
