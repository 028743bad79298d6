"""Memory of the device and of the host as tensors of torch, and the caller's tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxsched_runtime.cuda.binding import torch_module
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.tensor import TensorType


@dataclass(frozen=True, slots=True)
class _Shown:
    """Memory as other libraries take it."""

    __cuda_array_interface__: dict[str, Any]


def numbers_at(
    address: int, width: int, shape: Sequence[int], strides: Sequence[int], device: Device
) -> Any:
    """A torch tensor of integers of `width` bytes over memory of a GPU.

    Args:
        address: Of its first number.
        width: 1, 2, 4 or 8.
        shape: Its shape.
        strides: How many numbers neighbours lie apart, along each axis.
        device: The GPU.
    """
    shown = _Shown({
        "shape": tuple(shape), "typestr": f"<i{width}" if width > 1 else "|u1",
        "data": (address, False), "strides": tuple(width * step for step in strides),
        "version": 2,
    })  # fmt: skip
    return torch_module().as_tensor(shown, device=torch_device(device))


def bytes_of(array: np.ndarray) -> Any:
    """A torch tensor of bytes over an array's memory, which torch copies with all its threads."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch_module().frombuffer(memory, dtype=torch_module().uint8)


@functools.cache
def torch_dtype(element_type: int) -> Any:
    """The torch type of an ONNX element type."""
    return getattr(torch_module(), onnx.helper.tensor_dtype_to_np_dtype(element_type).name)


@functools.cache
def torch_device(device: Device) -> Any:
    """The device as torch knows it."""
    return torch_module().device(str(device))


def require_fit(name: str, kind: TensorType, tensor: Any) -> None:
    """Check that a torch tensor for input `name` has the input's shape and type.

    Raises:
        UsageError: It has not.
    """
    if tensor.shape != (kind.shape or ()):
        own, other = list(kind.shape or ()), list(tensor.shape)
        raise UsageError(f"Input '{name}' takes shape {own}, got {other}; reshape it.")
    dtype = torch_dtype(kind.element_type)
    if tensor.dtype != dtype:
        raise UsageError(f"Input '{name}' takes {dtype}, got {tensor.dtype}; convert it.")


def tensor_on_device(value: Any, device: Device) -> Any:
    """A torch tensor over the memory of any DLPack object, moved to the device if elsewhere."""
    tensor = tensor_of(value)
    is_there = tensor.device == torch_device(device) and tensor.is_contiguous()
    if is_there and not tensor.is_neg():  # whose memory holds other numbers
        return tensor
    return tensor.to(torch_device(device)).resolve_neg().contiguous()


def tensor_of_array(array: np.ndarray, device: Device) -> Any:
    """A torch tensor on a device of a host array, or the array where torch lacks its type."""
    if array.dtype.kind not in "biufc":
        return array
    return torch_module().from_numpy(np.asarray(array, order="C")).to(torch_device(device))


def tensor_of(value: Any) -> Any:
    """A torch tensor over the memory of any DLPack object."""
    torch = torch_module()
    return value if isinstance(value, torch.Tensor) else torch.from_dlpack(value)
