"""Calling libraries that keep a current GPU for each thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device

_first_gpu: list[Device] = []
"""The first GPU that this process uses."""


def called(device: Device, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What a function of ORT's returns; every GPU but the first is used in a thread of its own.

    ORT, cuBLAS and cuDNN each have a CUDA runtime of their own, which keeps a current device for
    each thread. Changing it back and forth in one thread made some kernels fail on two H200s.
    """
    if device.kind == "cuda" and not _first_gpu:
        _first_gpu.append(device)
    if device.kind == "cpu" or device in _first_gpu:
        return function(*values, **named)
    return _thread_of(device).submit(function, *values, **named).result()


@functools.cache
def _thread_of(device: Device) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, str(device), cuda.make_current, (device,))
