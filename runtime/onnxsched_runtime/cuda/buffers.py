"""Device memory of fixed addresses, and tensors in and out of it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx

from onnxsched_runtime.cuda.binding import check, cudart, torch_module
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.tensor import TensorType


class Buffer:
    """Device memory of a fixed address and type, with pinned memory to fill and read it."""

    def __init__(self, kind: TensorType, device: Device) -> None:
        torch = torch_module()
        self.kind, self.device = kind, device
        dtype = torch_dtype(kind.element_type)
        self.tensor = torch.zeros(kind.shape, dtype=dtype, device=str(device))
        self._pinned: Any = None

    @property
    def pointer(self) -> int:
        """Device address."""
        return int(self.tensor.data_ptr())

    def fill(self, array: np.ndarray, stream: Stream) -> None:
        """Copy host values in, on a stream, through pinned memory."""
        if self.kind.nbytes:
            np.copyto(self.staging, array.reshape(self.staging.shape).view(self.staging.dtype))
            self._copy(self.pointer, self._pinned.data_ptr(), stream)

    def require_fit(self, name: str, tensor: Any) -> None:
        """Check that a torch tensor for input `name` has the buffer's shape and type.

        Raises:
            UsageError: It has not.
        """
        own, other = list(self.tensor.shape), list(tensor.shape)
        if own != other:
            raise UsageError(f"Input '{name}' takes shape {own}, got {other}; reshape it.")
        if tensor.dtype != self.tensor.dtype:
            raise UsageError(
                f"Input '{name}' takes {self.tensor.dtype}, got {tensor.dtype}; convert it."
            )

    def fill_from_tensor(self, tensor: Any, stream: Stream) -> None:
        """Copy a device tensor in, on a stream."""
        if self.kind.nbytes and tensor.data_ptr() != self.pointer:
            self._copy(self.pointer, tensor.data_ptr(), stream)

    def fetch(self, stream: Stream) -> None:
        """Start the copy to pinned memory; `staging` holds it once the stream is done."""
        if self.kind.nbytes:
            _ = self.staging
            self._copy(self._pinned.data_ptr(), self.pointer, stream)

    def copy_to_new_tensor(self, stream: Stream) -> Any:
        """A new torch tensor that `stream` copies the contents into."""
        copy = torch_module().empty_like(self.tensor)
        if self.kind.nbytes:
            self._copy(copy.data_ptr(), self.pointer, stream)
        return copy

    @functools.cached_property
    def staging(self) -> np.ndarray:
        """Pinned memory as an array of the buffer's shape."""
        self._pinned = torch_module().empty(
            self.kind.nbytes, dtype=torch_module().uint8, pin_memory=True
        )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind.element_type)
        return np.asarray(self._pinned.numpy()).view(dtype).reshape(self.kind.shape)

    def _copy(self, target: int, source: int, stream: Stream) -> None:
        kind = cudart().cudaMemcpyKind.cudaMemcpyDefault
        nbytes = self.kind.nbytes
        check(cudart().cudaMemcpyAsync(target, source, nbytes, kind, stream.handle))


@functools.cache
def torch_dtype(element_type: int) -> Any:
    """The torch type of an ONNX element type."""
    torch = torch_module()
    special = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn,
               "float8_e5m2": torch.float8_e5m2}  # fmt: skip
    name = onnx.helper.tensor_dtype_to_np_dtype(element_type).name
    return special.get(name) or getattr(torch, name)


def tensor_on_device(value: Any, device: Device) -> Any:
    """A torch tensor over the memory of any DLPack object, moved to the device if elsewhere."""
    torch = torch_module()
    tensor = value if isinstance(value, torch.Tensor) else torch.from_dlpack(value)
    return tensor.to(str(device)).contiguous()
