"""Device memory, pinned memory, and values in and out of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import onnx

from onnxsched_runtime.cuda.binding import check, cudart, current_device, torch_module
from onnxsched_runtime.cuda.devices import synchronize
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.cuda.tensors import bytes_of, numbers_at, torch_device, torch_dtype
from onnxsched_runtime.device import Device
from onnxsched_runtime.tensor import TensorType

LARGE_NBYTES = 4 << 20
"""From this size on, a tensor goes between host arrays and the device in parts: below, starting
each takes what it saves (`docs/adr/0023-large-tensors-in-parts.md`)."""
PART_NBYTES = 2 << 20


class DeviceMemory:
    """One block of a GPU's memory, zeroed."""

    def __init__(self, nbytes: int, device: Device) -> None:
        """Allocate and clear it.

        Raises:
            OnnxschedError: There is not enough.
        """
        self.nbytes = nbytes
        self.pointer = 0
        self._device = device
        with current_device(device):  # a place for tensors of no bytes, too: ORT wants one
            self.pointer = int(check(cudart().cudaMalloc(max(nbytes, 1))))
        try:
            with current_device(device):
                check(cudart().cudaMemset(self.pointer, 0, nbytes))
            synchronize(device)
        except BaseException:
            self.close()
            raise

    def upload(self, array: np.ndarray, offset_nbytes: int) -> None:
        """Copy host values to a place in it, and wait until they are there."""
        self.repeat(array, offset_nbytes, array.nbytes)

    def repeat(self, block: np.ndarray, offset_nbytes: int, nbytes: int) -> None:
        """Fill a part of it with the same host values again and again, and wait likewise."""
        _write(block, self.pointer + offset_nbytes, nbytes, self._device)

    def close(self) -> None:
        """Free it."""
        if self.pointer:
            check(cudart().cudaFree(self.pointer))
            self.pointer = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PinnedArray:
    """Host memory that the device copies from and to without a detour."""

    def __init__(self, kind: TensorType, device: Device) -> None:
        """Allocate it, as an array of a tensor's type, for a device and for all others."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element_type)
        with current_device(device):  # else the first GPU gets a context, though nobody uses it
            self.pointer = int(
                check(cudart().cudaHostAlloc(kind.nbytes, cudart().cudaHostAllocDefault))
            )
        memory = memoryview((ctypes.c_char * kind.nbytes).from_address(self.pointer))
        self.array: np.ndarray = np.frombuffer(memory, dtype).reshape(kind.shape)

    def close(self) -> None:
        """Free it."""
        if self.pointer:
            check(cudart().cudaFreeHost(self.pointer))
            self.pointer = 0


class Buffer:
    """A tensor at a fixed address of device memory, with pinned memory to fill and read it."""

    def __init__(self, kind: TensorType, device: Device, pointer: int) -> None:
        """View memory that someone else owns."""
        self.kind, self.device, self.pointer = kind, device, pointer
        self._pinned: PinnedArray | None = None

    @property
    def is_large(self) -> bool:
        """Whether it is copied in parts, one to pinned memory while another is on its way."""
        return self.kind.nbytes >= LARGE_NBYTES

    def fill(self, array: np.ndarray, stream: Stream) -> None:
        """Copy host values in, on a stream, through pinned memory."""
        if not self.is_large or not array.flags.c_contiguous or array.nbytes != self.kind.nbytes:
            self.stage(array)
            self.upload(stream)
            return
        given, pinned = bytes_of(array), bytes_of(self.staging)
        for start, end in self._parts():
            pinned[start:end].copy_(given[start:end])  # by torch's threads
            self._copy(self.pointer, self.staging.ctypes.data, stream, start, end)

    def stage(self, array: np.ndarray) -> None:
        """Copy host values to pinned memory."""
        staging = self.staging
        if array.shape != staging.shape or array.dtype != staging.dtype:
            array = array.reshape(staging.shape).view(staging.dtype)
        np.copyto(staging, array)

    def repeat(self, block: np.ndarray) -> None:
        """Write the same host values again and again, and wait until they are there."""
        _write(block, self.pointer, self.kind.nbytes, self.device)

    def upload(self, stream: Stream) -> None:
        """Start the copy from pinned memory."""
        if self.kind.nbytes:
            self._copy(self.pointer, self.staging.ctypes.data, stream)

    def clear(self, stream: Stream) -> None:
        """Start to fill it with zeros."""
        if self.kind.nbytes:
            check(cudart().cudaMemsetAsync(self.pointer, 0, self.kind.nbytes, stream.handle))

    def fill_from_tensor(self, tensor: Any, stream: Stream) -> None:
        """Copy a device tensor in, on a stream."""
        if self.kind.nbytes and tensor.data_ptr() != self.pointer:
            self._copy(self.pointer, tensor.data_ptr(), stream)

    def as_bytes(self) -> Any:
        """A torch tensor of bytes over its memory."""
        return numbers_at(self.pointer, 1, (self.kind.nbytes,), (1,), self.device)

    def fill_from(self, other: Buffer, stream: Stream) -> None:
        """Start a copy from another buffer of its kind, on this device or another."""
        if self.kind.nbytes:
            self._copy(self.pointer, other.pointer, stream)

    def fetch(self, stream: Stream) -> None:
        """Start the copy to pinned memory; `staging` holds it once the stream is done."""
        if self.kind.nbytes:
            self._copy(self.staging.ctypes.data, self.pointer, stream)

    def fetched(self, stream: Stream) -> Callable[[], np.ndarray]:
        """Start the copy to pinned memory; returns what waits for it and makes an array of it."""
        parts = []
        for start, end in self._parts():
            self._copy(self.staging.ctypes.data, self.pointer, stream, start, end)
            parts.append((start, end, stream.record()))

        def taken() -> np.ndarray:
            if not self.is_large:
                for _, _, event in parts:
                    event.synchronize()
                return self.staging.copy()
            array = np.empty_like(self.staging)
            into, pinned = bytes_of(array), bytes_of(self.staging)
            for start, end, event in parts:
                event.synchronize()
                into[start:end].copy_(pinned[start:end])
            return array

        return taken

    def new_tensor(self) -> Any:
        """A new torch tensor of its shape and type, on its device."""
        dtype = torch_dtype(self.kind.element_type)
        return torch_module().empty(self.kind.shape, dtype=dtype, device=torch_device(self.device))

    def copy_to_tensor(self, tensor: Any, stream: Stream) -> None:
        """Copy the contents to a device tensor, on a stream."""
        if self.kind.nbytes:
            self._copy(tensor.data_ptr(), self.pointer, stream)

    @property
    def staging(self) -> np.ndarray:
        """Pinned memory as an array of the buffer's shape."""
        if self._pinned is not None:
            return self._pinned.array
        if self.kind.nbytes == 0:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind.element_type)
            return np.empty(self.kind.shape or (), dtype)
        self._pinned = PinnedArray(self.kind, self.device)
        return self._pinned.array

    def close(self) -> None:
        """Free the pinned memory."""
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None

    def _parts(self) -> list[tuple[int, int]]:
        """Where the parts that it is copied in begin and end, in bytes."""
        nbytes = self.kind.nbytes
        size = PART_NBYTES if self.is_large else max(nbytes, 1)
        return [(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]

    def _copy(
        self, target: int, source: int, stream: Stream, start: int = 0, end: int | None = None
    ) -> None:
        """Start the copy of all, or of some bytes, from one address to another."""
        kind = cudart().cudaMemcpyKind.cudaMemcpyDefault
        nbytes = (self.kind.nbytes if end is None else end) - start
        check(
            cudart().cudaMemcpyAsync(target + start, source + start, nbytes, kind, stream.handle)
        )


def _write(block: np.ndarray, address: int, nbytes: int, device: Device) -> None:
    """Fill memory of a GPU with host values again and again, and wait until they are there.

    CUDA's copy returns before, from memory that is not pinned, and our streams don't wait for it.
    """
    kind = cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
    with current_device(device):
        for start in range(0, nbytes, block.nbytes):
            count = min(block.nbytes, nbytes - start)
            check(cudart().cudaMemcpy(address + start, block.ctypes.data, count, kind))
        check(cudart().cudaStreamSynchronize(0))
