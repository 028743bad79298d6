"""How long bytes take from one device to another, from measurements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median


@dataclass(frozen=True, slots=True)
class TransferCurve:
    """The time of a transfer by its size, for one ordered pair of devices."""

    points: tuple[tuple[int, float], ...]
    """Bytes and microseconds. Sizes rise, times never fall."""
    is_peer: bool
    """Whether one device reads the other's memory itself; else bytes go through the host."""

    def __post_init__(self) -> None:
        """Check that there are points, and that they rise."""
        if not self.points or self.points[0][0] < 0 or self.points[0][1] < 0:
            raise ValueError(f"{self} has no points, or a negative one")
        if self.points[-1][0] == 0:
            raise ValueError(f"{self} has no bandwidth: it needs a point with bytes")
        for (small, short_us), (large, long_us) in pairwise(self.points):
            if not small < large or not short_us <= long_us:
                raise ValueError(f"{self} does not rise at {large} bytes")

    def us(self, nbytes: int) -> float:
        """Microseconds that `nbytes` take.

        Linear between points. Less than the first point takes as long as that, which is all
        latency; more than the last point goes at its bandwidth. O(log points).
        """
        position = bisect_left(self.points, (nbytes, 0.0))
        if position == 0:
            return self.points[0][1]
        small, short_us = self.points[position - 1]
        if position == len(self.points):
            return short_us * nbytes / small
        large, long_us = self.points[position]
        return short_us + (long_us - short_us) * (nbytes - small) / (large - small)


NVLINK = TransferCurve(
    ((4 << 10, 8.7), (1 << 20, 10.0), (16 << 20, 53.0), (256 << 20, 683.0)), is_peer=True
)
"""Peer copies between two H200s: what is assumed where nothing was measured."""


def curve_from_samples(samples: Iterable[tuple[int, float]], *, is_peer: bool) -> TransferCurve:
    """The curve through the medians of what was measured, made to rise.

    Where the median of a larger size is below that of a smaller one, both get their mean: the
    closest curve that never falls (pool adjacent violators, Ayer et al. 1955). O(n log n).

    Args:
        samples: Bytes and microseconds, several for each size, in any order.
        is_peer: See `TransferCurve`.

    Raises:
        ValueError: There are no samples, a negative one, or none with bytes.
    """
    by_size: dict[int, list[float]] = {}
    for nbytes, us in samples:
        by_size.setdefault(nbytes, []).append(us)
    pools: list[tuple[float, int]] = []  # The mean of neighbouring sizes, and how many they are.
    for nbytes in sorted(by_size):
        mean_us, count = median(by_size[nbytes]), 1
        while pools and pools[-1][0] > mean_us:
            before_us, before = pools.pop()
            mean_us = (before_us * before + mean_us * count) / (before + count)
            count += before
        pools.append((mean_us, count))
    times_us = [mean_us for mean_us, count in pools for _ in range(count)]
    return TransferCurve(tuple(zip(sorted(by_size), times_us, strict=True)), is_peer)
