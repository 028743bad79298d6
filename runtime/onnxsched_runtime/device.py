"""Devices and placements: where an operator runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self

from onnxsched_runtime.errors import UsageError

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """One processor, printed and parsed as `cuda:0`."""

    kind: DeviceKind
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `cuda:1`, `cuda` or `cpu`.

        Raises:
            UsageError: `text` names no device.
        """
        match = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,4}))?", text.strip())
        if match is None:
            raise UsageError(f"'{text}' is no device: write cpu, cuda or cuda:INDEX.")
        return cls(match[1], int(match[2] or 0))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """A stream of a device: a CUDA stream, or a worker thread of the CPU."""

    device: Device
    stream: int

    def __str__(self) -> str:
        return f"{self.device}/{self.stream}"
