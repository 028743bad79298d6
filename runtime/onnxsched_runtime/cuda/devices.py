"""What CUDA devices there are, and what they hold."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from onnxsched_runtime.cuda.binding import check, cudart, torch_module
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError


def device_count() -> int:
    """How many CUDA devices torch sees; 0 with a torch built without CUDA."""
    if "torch" not in sys.modules:
        _start_driver()
    torch = torch_module()
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def require_device(device: Device) -> None:
    """Check that a device is there.

    Raises:
        DeviceError: It is not.
    """
    if device.kind == "cpu":
        return
    count = device_count()
    if device.index >= count:
        there = f"{count} CUDA devices" if count else "no CUDA device"
        raise DeviceError(
            f"Device {device} is not available: this machine has {there}; "
            "`onnxsched doctor` says more."
        )


def _start_driver() -> None:
    """Let the driver make the first GPU's context while this thread does something else.

    Making it takes some tenths of a second, as does importing torch: side by side they cost a
    command that starts afresh only the longer of the two. Without a driver nothing happens.
    """

    def retain() -> None:
        try:
            driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    threading.Thread(target=retain, daemon=True).start()


def synchronize(device: Device) -> None:
    """Wait for everything on a device."""
    torch_module().cuda.synchronize(device.index)


def device_properties(device: Device) -> dict[str, Any]:
    """What a GPU is and what one of its multiprocessors holds."""
    torch = torch_module()
    found = torch.cuda.get_device_properties(device.index)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_nbytes": found.total_memory,
        "multiprocessor_count": found.multi_processor_count,
        "shared_memory_nbytes": found.shared_memory_per_multiprocessor,
        "registers": found.regs_per_multiprocessor,
        "threads": found.max_threads_per_multi_processor,
        "l2_nbytes": found.L2_cache_size,
    }


def library_versions() -> dict[str, str]:
    """Versions of torch, CUDA, cuDNN and the driver; no driver without a device."""
    torch = torch_module()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if device_count():
        driver = check(cudart().cudaDriverGetVersion())
        versions["driver_cuda"] = f"{driver // 1000}.{driver % 1000 // 10}"
        versions["driver"] = _driver_version()
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def _driver_version() -> str:
    """The version of the kernel driver, e.g. 580.95.05; empty where Linux does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else ""


def has_peer_access(source: Device, target: Device) -> bool:
    """Whether `source` can reach the memory of `target` directly."""
    return bool(torch_module().cuda.can_device_access_peer(source.index, target.index))
