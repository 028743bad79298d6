"""Calling libraries that keep a current GPU for each thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device

_first_gpu: list[Device] = []
"""The first GPU that this process uses."""
_choosing = threading.RLock()  # it may be entered again where garbage is collected meanwhile
_own_thread = threading.local()
"""Its `device` is that of the GPU that a thread is for."""


def called(device: Device, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What a function of ORT's returns; every GPU but the first is used in a thread of its own.

    ORT, cuBLAS and cuDNN each have a CUDA runtime of their own, which keeps a current device for
    each thread. Changing it back and forth in one thread made some kernels fail on two H200s.
    """
    if device.kind == "cpu":
        return function(*values, **named)
    with _choosing:
        if not _first_gpu:
            _first_gpu.append(device)
        is_here = device in _first_gpu or getattr(_own_thread, "device", None) == device
        thread = None if is_here else _thread_of(device)
    if thread is None:
        return function(*values, **named)
    future = thread.submit(function, *values, **named)
    try:
        return future.result()
    except BaseException:  # an interrupt: what it uses would be freed under it
        wait((future,))
        raise


@functools.cache
def _thread_of(device: Device) -> ThreadPoolExecutor:
    def begin() -> None:
        _own_thread.device = device
        cuda.make_current(device)

    return ThreadPoolExecutor(1, str(device), begin)
