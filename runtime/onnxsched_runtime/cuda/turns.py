"""Turns of another context on a GPU, which make it forget idle streams.

A GPU keeps the queue of every stream that a process has used loaded until another context has its
turn, and starts kernels later the more there are; see `docs/adr/0013-few-streams.md`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Self

from onnxsched_runtime.cuda.binding import check_driver, driver
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError

_NOTHING = b".version 6.4\n.target sm_75\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"
"""A kernel that does nothing, as PTX."""


class OtherContext:
    """A context on a GPU beside the one that all libraries share.

    It takes 0.16 s to make, and 0.55 GB of the GPU's memory.
    """

    def __init__(self, device: Device) -> None:
        """Make one.

        Raises:
            OnnxschedError: The driver refuses, for want of memory say.
        """
        self.device = device
        # as every CUDA names it; the bindings' function takes other arguments in each
        self._library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        check_driver(driver().cuInit(0))
        number = int(check_driver(driver().cuDeviceGet(device.index)))
        self._native = ctypes.c_void_p()
        with _same_context():
            if error := self._library.cuCtxCreate_v2(ctypes.byref(self._native), 0, number):
                raise OnnxschedError(f"CUDA makes no context on {device} (error {error}).")
            try:
                self._kernel = _loaded()
            except BaseException:
                self.close()
                raise

    def take_turn(self) -> None:
        """Run a kernel and wait for it.

        Raises:
            OnnxschedError: The GPU no longer works.
        """
        own = driver().CUcontext(self._native.value)
        check_driver(driver().cuCtxPushCurrent(own))
        try:
            check_driver(driver().cuLaunchKernel(self._kernel, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0))
            check_driver(driver().cuCtxSynchronize())
        finally:
            check_driver(driver().cuCtxPopCurrent())

    def close(self) -> None:
        """Destroy it."""
        self._library.cuCtxDestroy_v2(self._native)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _loaded() -> Any:
    """The kernel in the context that is current."""
    module = check_driver(driver().cuModuleLoadData(_NOTHING))
    return check_driver(driver().cuModuleGetFunction(module, b"nothing"))


@contextmanager
def _same_context() -> Iterator[None]:
    """Make the thread's context current again in the end."""
    before = check_driver(driver().cuCtxGetCurrent())
    try:
        yield
    finally:
        check_driver(driver().cuCtxSetCurrent(before))


_others: ContextVar[tuple[OtherContext, ...]] = ContextVar("_others", default=())


@contextmanager
def other_contexts(devices: Iterable[Device]) -> Iterator[None]:
    """Let `forget_idle_streams`, and so all that is timed meanwhile, forget those of some devices.

    What is no GPU, has a context already or no memory for it is left out.
    """
    held = _others.get()
    done = {other.device for other in held}
    with ExitStack() as stack:
        for device in devices:
            if device.kind == "cuda" and device not in done:
                with suppress(OnnxschedError):
                    held += (stack.enter_context(OtherContext(device)),)
        token = _others.set(held)
        try:
            yield
        finally:
            _others.reset(token)


def forget_idle_streams() -> None:
    """Let GPUs start kernels as fast as they can, whatever streams the process has used.

    Only within `other_contexts`, and on its devices.

    Raises:
        OnnxschedError: A GPU no longer works.
    """
    for other in _others.get():
        other.take_turn()
