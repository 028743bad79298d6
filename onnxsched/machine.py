"""The machine a schedule is made for."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsched_runtime.device import Device, Placement


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices, and how many streams a schedule may use on each."""

    devices: tuple[Device, ...]
    stream_count: int
    """The cap for each device, at least 1."""

    def __post_init__(self) -> None:
        """Check that there is a device and a stream."""
        if not self.devices or self.stream_count < 1:
            raise ValueError(f"{self} has no device or no stream")

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Every stream of every device, devices first."""
        return tuple(
            Placement(device, stream)
            for device in self.devices
            for stream in range(self.stream_count)
        )
