"""Measure how long tensors take from one device to another."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import permutations
from typing import Any

import numpy as np

from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.measure import Progress
from onnxsched.transfer import TransferCurve, curve_from_samples
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device

SIZES_NBYTES = tuple(4096 << shift for shift in range(0, 15, 2))
"""From 4 KiB to 64 MiB, each four times the one before."""
_SAMPLE_COUNT = 7

Transfers = Mapping[tuple[Device, Device], TransferCurve]
"""By source and target."""


def measure_transfers(
    devices: Sequence[Device], cache: MeasurementCache, progress: Progress
) -> Transfers:
    """The curve of every ordered pair of devices, measured as plans copy."""
    pairs = tuple(permutations(devices, 2))
    curves: dict[str, TransferCurve] = {}
    for number, (source, target) in enumerate(pairs):
        progress("measuring transfers", number, len(pairs))
        key = _key(source, target)
        if key not in curves:
            kept = _kept(cache.read(key))
            curve = curves[key] = kept or _measured(source, target)
            if kept is None:
                cache.write(key, {"points": curve.points, "is_peer": curve.is_peer})
    return {pair: curves[_key(*pair)] for pair in pairs}


def _key(source: Device, target: Device) -> str:
    """Groups of CPU threads are all alike; GPUs are what they are and where they are."""
    if source.kind == "cpu":
        return json.dumps(["transfer", "cpu"])
    names = [cuda.device_properties(device)["name"] for device in (source, target)]
    return json.dumps(["transfer", str(source), str(target), *names])


def _kept(content: Any) -> TransferCurve | None:
    """What the cache holds; None where that is nothing, or no curve."""
    try:
        points = tuple((int(nbytes), float(us)) for nbytes, us in content["points"])
        return TransferCurve(points, bool(content["is_peer"]))
    except (KeyError, TypeError, ValueError):
        return None


def _measured(source: Device, target: Device) -> TransferCurve:
    if source.kind == "cpu":
        samples = [(nbytes, us) for nbytes in SIZES_NBYTES for us in _copies_us(nbytes)]
        return curve_from_samples(samples, is_peer=True)
    samples = [
        (nbytes, us)
        for nbytes in SIZES_NBYTES
        for us in cuda.time_copies_us(source, target, nbytes, _SAMPLE_COUNT)
    ]
    return curve_from_samples(samples, is_peer=cuda.has_peer_access(target, source))


def _copies_us(nbytes: int) -> tuple[float, ...]:
    """Times in which a thread copies an array to memory of its own."""
    array = np.zeros(nbytes, np.uint8)
    samples = []
    for _ in range(_SAMPLE_COUNT):
        start_ns = time.perf_counter_ns()
        copy(array)
        samples.append((time.perf_counter_ns() - start_ns) / 1e3)
    return tuple(samples)
