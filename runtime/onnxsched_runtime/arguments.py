"""Inputs and outputs as ONNX Runtime shows them, and the host values that fit them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.errors import UsageError


@dataclass(frozen=True)
class NodeArg:
    """An input or output, with the fields of ONNX Runtime's own."""

    name: str
    type: str
    """E.g. `tensor(float)`."""
    shape: list[int] | None
    """None where it is not known before the run."""

    @functools.cached_property
    def layout(self) -> tuple[tuple[int, ...] | None, np.dtype | None]:
        """Shape and type of an array that fits; None where no array does, or any shape."""
        shape = None if self.shape is None else tuple(self.shape)
        return shape, _dtype_of(self.type) if self.type.startswith("tensor(") else None

    def fits(self, value: Any) -> bool:
        """Whether a value is an array that needs no conversion; asked at every run."""
        return (
            type(value) is np.ndarray
            and (value.shape, value.dtype) == self.layout
            and value.flags.c_contiguous
        )


def arguments_of(values: Sequence[onnx.ValueInfoProto], annotation: Annotation) -> list[NodeArg]:
    """What a model's inputs or outputs are."""
    arguments = []
    for value in values:
        kind = annotation.tensors.get(value.name)
        shape = None if kind is None or kind.shape is None else list(kind.shape)
        arguments.append(NodeArg(value.name, _ort_type(value.type), shape))
    return arguments


def _ort_type(kind: onnx.TypeProto) -> str:
    """A type as ONNX Runtime writes it, e.g. `seq(tensor(float))`."""
    if kind.HasField("sequence_type"):
        return f"seq({_ort_type(kind.sequence_type.elem_type)})"
    if kind.HasField("optional_type"):
        return f"optional({_ort_type(kind.optional_type.elem_type)})"
    if kind.HasField("map_type"):
        key = onnx.TensorProto.DataType.Name(kind.map_type.key_type).lower()
        return f"map({key},{_ort_type(kind.map_type.value_type)})"
    return f"tensor({onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()})"


def host_array(argument: NodeArg, value: Any) -> Any:
    """A host value of the input's type and shape.

    Raises:
        UsageError: It is of another, or no array at all.
    """
    if not argument.type.startswith("tensor("):
        return value
    array = as_array(argument.name, value)
    dtype = _dtype_of(argument.type)
    if dtype.kind == "O" and array.dtype.kind not in "OU":
        raise UsageError(
            f"Input '{argument.name}' takes strings, got {array.dtype.name}; convert it."
        )
    if array.dtype != dtype and dtype.kind != "O":
        is_swapped = array.dtype.name == dtype.name
        found = f"{array.dtype.name} of another byte order" if is_swapped else array.dtype.name
        raise UsageError(f"Input '{argument.name}' takes {dtype.name}, got {found}; convert it.")
    _check_shape(argument, array.shape)
    return np.ascontiguousarray(array) if array.ndim else array


def as_array(name: str, value: Any) -> np.ndarray:
    """The value of input `name`, a tensor of torch's perhaps, as an array.

    Raises:
        UsageError: It is none.
    """
    try:
        return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, on `meta`, lazily negated
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"Input '{name}' can't be read ({reason}).") from error


def zeros(argument: NodeArg) -> np.ndarray:
    """A value for an input that the caller does not care about: zeros are valid indices too.

    Raises:
        UsageError: Its shape is not known, or it is no tensor.
    """
    if argument.shape is None or not argument.type.startswith("tensor("):
        raise UsageError(f"Input '{argument.name}' has no fixed shape; give it a value.")
    return np.zeros(argument.shape, _dtype_of(argument.type))


@functools.cache
def _dtype_of(kind: str) -> np.dtype:
    element = onnx.TensorProto.DataType.Value(kind[7:-1].upper())
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))


def _check_shape(argument: NodeArg, shape: tuple[int, ...]) -> None:
    if argument.shape is not None and list(shape) != argument.shape:
        raise UsageError(
            f"Input '{argument.name}' takes shape {argument.shape}, got {list(shape)}; the "
            "schedule is made for one shape, so optimize again for another (--shape)."
        )
