"""What operators and transfers cost: the seam between measuring and scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from onnxsched_runtime.device import Device

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """The cost of one operator when it runs alone on a device."""

    duration_us: float
    bound: Bound = "compute"
    """The resource it presses harder: arithmetic units or memory bandwidth."""
    block_share: float = 0.0
    """Largest share of a multiprocessor's shared memory, threads or registers that one block
    of its kernels takes, between 0 and 1 (Opara's resource demand)."""


class CostModel(Protocol):
    """Predicts costs. Pure: the same question has the same answer."""

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """Cost of an operator, given by its index in the graph, on `device`."""
        ...

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """Time to move `nbytes` between devices; 0 within one device."""
        ...


@dataclass(frozen=True, slots=True)
class TableCost:
    """A cost model read from a table, equal on every device.

    Transfers between different devices take `latency_us` plus the bytes over the bandwidth.
    """

    operators: tuple[OperatorCost, ...]
    latency_us: float = 10.0
    bandwidth_bytes_per_us: float = 300_000.0

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """Cost of the operator with this index; the device does not matter."""
        return self.operators[operator]

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """Latency plus size over bandwidth; 0 within one device."""
        if source == target:
            return 0.0
        return self.latency_us + nbytes / self.bandwidth_bytes_per_us
