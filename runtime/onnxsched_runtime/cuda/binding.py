"""The CUDA bindings and torch, each imported at first use.

Streams, events, graphs and memory need the bindings alone, which import in milliseconds; torch,
which takes seconds, comes in where the caller's tensors or the profiler are torch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, OnnxschedError


@functools.cache
def torch_module() -> Any:
    """The module torch."""
    import torch as module

    return module


def load_torch() -> None:
    """Import torch for the CUDA libraries it loads; without torch nothing happens."""
    with contextlib.suppress(ImportError):
        torch_module()


def is_bound() -> bool:
    """Whether the bindings are installed."""
    try:
        cudart()
    except DeviceError:
        return False
    return True


@functools.cache
def cudart() -> Any:
    """The module of the CUDA runtime's functions.

    Raises:
        DeviceError: It is not installed.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError as error:
        raise DeviceError(
            "The CUDA bindings are not installed; install a torch built for CUDA, which brings "
            "cuda-bindings."
        ) from error
    return module


@functools.cache
def driver() -> Any:
    """The module of the CUDA driver's functions."""
    from cuda.bindings import driver as module

    return module


def check(result: tuple[Any, ...]) -> Any:
    """Unpack what a CUDA call returns.

    Raises:
        OnnxschedError: The call failed.
    """
    error, *values = result
    if error != cudart().cudaError_t.cudaSuccess:
        _, text = cudart().cudaGetErrorString(error)
        raise OnnxschedError(f"CUDA reports error {int(error)}: {text.decode()}.")
    return values[0] if len(values) == 1 else tuple(values)


def check_driver(result: tuple[Any, ...]) -> Any:
    """Unpack what a call of the CUDA driver returns.

    Raises:
        OnnxschedError: The call failed.
    """
    error, *values = result
    if int(error):
        raise OnnxschedError(f"CUDA reports {error.name.removeprefix('CUDA_ERROR_')}.")
    return values[0] if len(values) == 1 else tuple(values)


@contextlib.contextmanager
def current_device(device: Device) -> Iterator[None]:
    """Make a GPU this thread's current one for a while.

    By its context, which the driver knows: every library has a CUDA runtime of its own, and what
    one of them takes for the current device, another may have changed.
    """
    check_driver(driver().cuCtxPushCurrent(_primary_context(device.index)))
    try:
        yield
    finally:
        check_driver(driver().cuCtxPopCurrent())


def make_current(device: Device) -> None:
    """Make a GPU this thread's current one for good."""
    check(cudart().cudaSetDevice(device.index))


@functools.cache
def _primary_context(index: int) -> Any:
    """The context that all libraries share on a device, held until the process ends."""
    check_driver(driver().cuInit(0))
    native = check_driver(driver().cuDeviceGet(index))
    return check_driver(driver().cuDevicePrimaryCtxRetain(native))
