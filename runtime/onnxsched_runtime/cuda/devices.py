"""What CUDA devices there are, and what they hold."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from onnxsched_runtime.cuda.binding import check, cudart, current_device, is_bound
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError


@functools.cache
def device_count() -> int:
    """How many CUDA devices there are; 0 without the bindings or without a driver."""
    if not is_bound():
        return 0
    error, count = cudart().cudaGetDeviceCount()
    return int(count) if error == cudart().cudaError_t.cudaSuccess else 0


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


def synchronize(device: Device) -> None:
    """Wait for everything on a device."""
    with current_device(device):
        check(cudart().cudaDeviceSynchronize())


def free_memory_nbytes(device: Device) -> int:
    """Memory of a device that no one holds, other processes included."""
    with current_device(device):
        free, _ = check(cudart().cudaMemGetInfo())
    return int(free)


def device_properties(device: Device) -> dict[str, Any]:
    """What a GPU is and what one of its multiprocessors holds."""
    found = check(cudart().cudaGetDeviceProperties(device.index))
    return {
        "name": found.name.decode().rstrip("\0"),
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_nbytes": found.totalGlobalMem,
        "multiprocessor_count": found.multiProcessorCount,
        "shared_memory_nbytes": found.sharedMemPerMultiprocessor,
        "registers": found.regsPerMultiprocessor,
        "threads": found.maxThreadsPerMultiProcessor,
        "blocks": found.maxBlocksPerMultiProcessor,
        "l2_nbytes": found.l2CacheSize,
    }


def library_versions() -> dict[str, str]:
    """Versions of torch, CUDA, cuDNN and the driver; no driver without a device."""
    versions = {"torch": importlib.metadata.version("torch")}
    if device_count():
        versions["cuda"] = _dotted(check(cudart().cudaRuntimeGetVersion()))
        versions["driver_cuda"] = _dotted(check(cudart().cudaDriverGetVersion()))
        versions["driver"] = _driver_version()
        versions["cudnn"] = _cudnn_version()
    return versions


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _cudnn_version() -> str:
    """The version of the cuDNN wheel, or of the library that the system has; empty without."""
    for distribution in importlib.metadata.distributions():
        if re.fullmatch(r"nvidia-cudnn-cu\d+", distribution.name or ""):
            return distribution.version
    try:
        library = ctypes.CDLL("cudnn64_9.dll" if os.name == "nt" else "libcudnn.so.9")
    except OSError:
        return ""
    return str(library.cudnnGetVersion())


def _driver_version() -> str:
    """The version of the kernel driver, e.g. 580.95.05; empty where Linux does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else ""


def enable_peer_access(devices: Sequence[Device]) -> None:
    """Let every device reach the memory of every other, where the machine allows it."""
    for device, other in permutations(devices, 2):
        if has_peer_access(device, other):
            with current_device(device):
                error = cudart().cudaDeviceEnablePeerAccess(other.index, 0)[0]
            if error != cudart().cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
                check((error,))


def has_peer_access(source: Device, target: Device) -> bool:
    """Whether `source` can reach the memory of `target` directly."""
    return bool(check(cudart().cudaDeviceCanAccessPeer(source.index, target.index)))
