"""What operators and transfers cost: the seam between measuring and scheduling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from onnxsched.transfer import NVLINK, TransferCurve
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
    sm_share: float = 0.0
    """Share of the multiprocessors that its blocks cover, between 0 and 1: the mean over the time
    that it runs."""
    is_view: bool = False
    """It has no kernel: alone it takes the time of a copy, inside a chain none."""


@dataclass(frozen=True, slots=True)
class Contention:
    """What running beside others costs an operator, over its time alone.

    While several run on a device, one takes `1 + sm_slowdown * (sm_share of all others) +
    launch_slowdown * (number of others)` times as long. The slow-downs sum to at most 1, so side
    by side is never slower than one after another. The default is no contention at all.
    """

    duration_factor: float = 1.0
    """Of durations: caches hold other things than when an operator is repeated alone."""
    start_us: float = 0.0
    """From when an operator can start until it does."""
    event_us: float = 0.0
    """What a tensor from another stream takes longer than one from the same stream."""
    sm_slowdown: float = 0.0
    launch_slowdown: float = 0.0
    """Whatever the share: the front end and the caches are common to all."""
    link_share: float = 0.0
    """Of what a transfer takes beyond one of nothing: so long no other can use its link."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        slowdowns = (self.sm_slowdown, self.launch_slowdown, self.link_share)
        least = min(self.start_us, self.event_us, *slowdowns)
        numbers = (self.duration_factor, least, self.start_us, self.event_us, self.link_share)
        if not all(map(math.isfinite, numbers)) or self.duration_factor <= 0 or least < 0:
            raise ValueError(f"{self} has a number that is negative or not finite")
        if not self.sm_slowdown + self.launch_slowdown <= 1:
            raise ValueError(f"{self} makes side by side slower than one after another")

    @property
    def slows(self) -> bool:
        """Whether operators slow each other; overheads alone don't."""
        return self.sm_slowdown + self.launch_slowdown > 0


class CostModel(Protocol):
    """Predicts costs. Pure: the same question has the same answer."""

    @property
    def contention(self) -> Contention:
        """What running beside others costs."""
        ...

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """Cost of an operator, given by its index in the graph, on `device`."""
        ...

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """Time to move `nbytes` between devices; 0 within one device."""
        ...


@dataclass(frozen=True, slots=True)
class TableCost:
    """A cost model read from tables; operators cost the same on every device."""

    operators: tuple[OperatorCost, ...]
    contention: Contention = Contention()
    transfers: Mapping[tuple[Device, Device], TransferCurve] = field(default_factory=dict)
    """What was measured, by source and target."""
    unmeasured: TransferCurve = NVLINK
    """Of all other pairs."""

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """Cost of the operator with this index; the device does not matter."""
        return self.operators[operator]

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """As the curve of the pair says; 0 within one device."""
        if source == target:
            return 0.0
        return self.transfers.get((source, target), self.unmeasured).us(nbytes)


def mean_share(parts: Iterable[tuple[float, float]]) -> float:
    """The mean of shares over time, each given with the microseconds for which it lasts."""
    work = total_us = 0.0
    for duration_us, share in parts:
        work += duration_us * share
        total_us += duration_us
    return work / total_us if total_us else 0.0
