"""What this machine is and which libraries it runs: part of every result."""

from __future__ import annotations

import itertools
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxsched.machine import Machine
from onnxsched_runtime import cuda, session
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, UsageError
from onnxsched_runtime.version import own_version


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
        "onnxsched": own_version(),
        **session.library_versions(),
        **(cuda.library_versions() if device.kind == "cuda" else {}),
    }


def choose_devices(text: str) -> tuple[Device, ...]:
    """Read `--device`: one or several of a kind, with commas between them.

    `auto` is the first GPU, or the CPU where there is none. Several CPU devices are groups of
    threads, numbered from `cpu:0`.

    Raises:
        UsageError: Something is no device, there twice, or of another kind than the others.
        DeviceError: A device is not on this machine.
    """
    if text == "auto":
        return (Device("cuda" if cuda.device_count() and session.is_cuda_built() else "cpu"),)
    try:
        devices = tuple(Device.parse(part) for part in text.split(","))
    except UsageError as error:
        what = str(error).partition(":")[0]
        raise UsageError(
            f"{what}: write auto, cpu, cuda:INDEX, or several, such as cuda:0,cuda:1."
        ) from error
    for number, device in enumerate(devices):
        if device in devices[:number]:
            raise UsageError(f"'{text}' names {device} twice; name each device once.")
        if device.kind != devices[0].kind:
            raise UsageError(
                f"'{text}' mixes {devices[0]} and {device}; a model runs on GPUs or on the CPU."
            )
        if device.kind == "cpu" and device.index >= len(devices):
            raise DeviceError(
                f"Device {device} is not available: the CPU is cpu:0, and several groups of its "
                "threads are numbered from there."
            )
        cuda.require_device(device)
    return devices


def choose_device(text: str) -> Device:
    """Read `--device` where only one is wanted.

    Raises:
        UsageError: It is no device, or several.
        DeviceError: It is not on this machine.
    """
    device, *others = choose_devices(text)
    if others:
        raise UsageError(f"'{text}' names several; a model without a schedule runs on one.")
    return device


def pairs_through_host(devices: Sequence[Device]) -> tuple[str, ...]:
    """Pairs of GPUs between which tensors go through the host, e.g. `cuda:0-cuda:1`.

    They have no access to each other's memory in one direction or the other. A graph is one
    nevertheless: the driver copies in two steps.
    """
    if any(device.kind == "cpu" for device in devices):
        return ()
    return tuple(
        f"{one}-{other}"
        for one, other in itertools.combinations(devices, 2)
        if not (cuda.has_peer_access(one, other) and cuda.has_peer_access(other, one))
    )


_RESERVE_NBYTES = 1 << 30
"""Of each GPU's free memory, for contexts and workspaces of libraries, the profiler's too."""


def machine_of(devices: tuple[Device, ...], stream_count: int) -> Machine:
    """The machine to schedule for: several GPUs with what schedules may use of their memory.

    One device, and the CPU, are not limited: what does not fit shows when it is run.
    """
    if len(devices) == 1 or devices[0].kind == "cpu":
        return Machine(devices, stream_count)
    free = {device: cuda.free_memory_nbytes(device) - _RESERVE_NBYTES for device in devices}
    return Machine(devices, stream_count, {d: max(0, nbytes) for d, nbytes in free.items()})
