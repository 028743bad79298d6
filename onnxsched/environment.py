"""What this machine is and which libraries it runs: part of every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from onnxsched_runtime import cuda, session
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError


def version() -> str:
    """The version of onnxsched; `source` where it runs from a checkout uninstalled."""
    try:
        return importlib.metadata.version("onnxsched")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def device_name(device: Device) -> str:
    """The product name of a device.

    Raises:
        DeviceError: It is not on this machine.
    """
    if device.kind == "cpu":
        return f"{_processor_name()}, {os.cpu_count()} cores"
    cuda.require_device(device)
    return str(cuda.device_properties(device)["name"])


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def describe_environment(device: Device) -> dict[str, Any]:
    """All that a measurement on `device` depends on."""
    return {
        "device": device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "onnxsched": version(),
        **session.library_versions(),
        **(cuda.library_versions() if device.kind == "cuda" else {}),
    }


def choose_device(text: str) -> Device:
    """Read `--device`: `auto` is the first GPU, or the CPU where there is none.

    Raises:
        UsageError: It is no device.
        DeviceError: It is not on this machine, or several were asked for.
    """
    if text == "auto":
        return Device("cuda" if cuda.device_count() and session.is_cuda_built() else "cpu")
    if "," in text:
        raise DeviceError(f"--device {text} names several; this release schedules for one.")
    device = Device.parse(text)
    if device.kind == "cpu" and device.index:
        raise DeviceError(f"Device {device} is not available: the CPU is cpu:0.")
    cuda.require_device(device)
    return device
