"""What was measured of a model's operators, as values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxsched.cost import Bound, OperatorCost, mean_share


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """One GPU kernel of an operator, as the profiler saw it."""

    name: str
    duration_us: float
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    registers: int
    """Per thread."""
    shared_memory_nbytes: int
    """Per block."""
    occupancy: float
    """Estimated achieved occupancy, between 0 and 1."""

    def block_share(self, limits: Multiprocessor) -> float:
        """The largest share of a multiprocessor that one block takes of any resource.

        Opara's demand, over all three resources that its paper names.
        """
        threads = self.block[0] * self.block[1] * self.block[2]
        return min(
            1.0,
            max(
                self.shared_memory_nbytes / limits.shared_memory_nbytes,
                threads / limits.threads,
                threads * self.registers / limits.registers,
            ),
        )

    def sm_share(self, limits: Multiprocessor) -> float:
        """The share of the multiprocessors that get a block, where all blocks fit at once.

        How many blocks one multiprocessor could hold does not matter: predictions are as good
        without it (see `docs/adr/0008-contention.md`).
        """
        return min(1.0, self.grid[0] * self.grid[1] * self.grid[2] / limits.count)


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What one multiprocessor (SM) of a GPU holds, and how many there are."""

    shared_memory_nbytes: int
    registers: int
    threads: int
    count: int


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device reaches at best, measured: a large matrix product and a large copy."""

    flops_per_us: float
    bytes_per_us: float

    def bound(self, flop_count: int, nbytes: int) -> Bound:
        """The resource that limits work of so many operations over so many bytes."""
        compute_us, memory_us = flop_count / self.flops_per_us, nbytes / self.bytes_per_us
        return "compute" if compute_us > memory_us else "memory"


@dataclass(frozen=True, slots=True)
class OperatorProfile:
    """The measurements of one operator, alone on the device."""

    samples_us: tuple[float, ...]
    """Every sample; empty for an operator that could not be run alone."""
    kernels: tuple[KernelProfile, ...] = ()
    refusal: str | None = None
    """Why it can't be captured into a CUDA graph; None where it can."""

    @property
    def duration_us(self) -> float:
        """The median sample."""
        return statistics.median(self.samples_us) if self.samples_us else 0.0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> OperatorProfile:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        samples = tuple(float(sample) for sample in content["samples_us"])
        if any(not sample > 0 for sample in samples):
            raise ValueError("a sample is not positive")
        refusal = content["refusal"]
        kernels = tuple(_kernel(entry) for entry in content["kernels"])
        return cls(samples, kernels, None if refusal is None else str(refusal))


def _kernel(entry: Mapping[str, Any]) -> KernelProfile:
    return KernelProfile(
        name=str(entry["name"]),
        duration_us=float(entry["duration_us"]),
        grid=_three(entry["grid"]),
        block=_three(entry["block"]),
        registers=int(entry["registers"]),
        shared_memory_nbytes=int(entry["shared_memory_nbytes"]),
        occupancy=float(entry["occupancy"]),
    )


def _three(values: Any) -> tuple[int, int, int]:
    x, y, z = (int(value) for value in values)
    return x, y, z


@dataclass(frozen=True)
class Profile:
    """The measurements of a model on a device."""

    operators: Mapping[str, OperatorProfile]
    """By node name."""
    bounds: Mapping[str, Bound]
    """By node name: what limits it on this device's measured roofline."""
    multiprocessor: Multiprocessor | None
    """None on the CPU."""
    measured_count: int
    """How many distinct operators were run now; the rest came from the cache."""

    @property
    def refusals(self) -> dict[str, str]:
        """Why a node can't be captured, for those where the attempt failed."""
        return {name: o.refusal for name, o in self.operators.items() if o.refusal}

    def cost(self, name: str) -> OperatorCost:
        """The cost of a node for scheduling."""
        operator, bound = self.operators[name], self.bounds[name]
        limits = self.multiprocessor
        if limits is None:
            return OperatorCost(operator.duration_us, bound)
        kernels = operator.kernels
        return OperatorCost(
            operator.duration_us,
            bound,
            block_share=max((k.block_share(limits) for k in kernels), default=0.0),
            sm_share=mean_share(
                (kernel.duration_us, kernel.sm_share(limits)) for kernel in kernels
            ),
            is_view=not kernels,
        )
