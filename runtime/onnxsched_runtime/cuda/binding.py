"""torch and the CUDA bindings it brings, imported at first use."""

from __future__ import annotations

import functools
from typing import Any

from onnxsched_runtime.errors import DeviceError, OnnxschedError


@functools.cache
def torch_module() -> Any:
    """The module torch."""
    import torch as module

    return module


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
