"""The machine a schedule is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

from onnxsched_runtime.device import Device, Placement


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices, and how many streams a schedule may use on each."""

    devices: tuple[Device, ...]
    stream_count: int
    """The cap for each device, at least 1."""
    memory_nbytes: Mapping[Device, int] = field(default_factory=dict)
    """What a schedule may use of each device's memory; unlimited for devices left out."""

    def __post_init__(self) -> None:
        """Check that there is a device and a stream."""
        if not self.devices or self.stream_count < 1:
            raise ValueError(f"{self} has no device or no stream")

    @property
    def is_limited(self) -> bool:
        """Whether memory is limited on any device."""
        return any(device in self.memory_nbytes for device in self.devices)

    @property
    def alone(self) -> Machine:
        """The machine with one device only: the one with the most memory, the first of equals."""
        largest = max(self.devices, key=self.room_nbytes)
        return replace(self, devices=(largest,))

    def room_nbytes(self, device: Device) -> float:
        """How much of a device's memory may be used; inf where that is not limited."""
        return self.memory_nbytes.get(device, inf)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Every stream of every device, devices first."""
        return tuple(
            Placement(device, stream)
            for device in self.devices
            for stream in range(self.stream_count)
        )
