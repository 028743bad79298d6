"""Copies between GPUs, as they are measured for scheduling."""

from __future__ import annotations

from itertools import permutations

import pytest

from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.transfers import SIZES_NBYTES, measure_transfers
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device


def test_curves_rise_and_are_those_of_a_link() -> None:
    devices = tuple(Device("cuda", index) for index in range(cuda.device_count()))
    if len(devices) < 2:
        pytest.skip("needs two CUDA devices")
    curves = measure_transfers(devices, MeasurementCache(None, ""), lambda *_: None)
    assert curves.keys() == {*permutations(devices, 2)}
    for (source, target), curve in curves.items():
        assert tuple(nbytes for nbytes, _ in curve.points) == SIZES_NBYTES
        assert curve.is_peer == cuda.has_peer_access(target, source)
        assert 1.0 < curve.us(4096) < 100.0
        gigabytes_per_s = SIZES_NBYTES[-1] / curve.us(SIZES_NBYTES[-1]) / 1e3
        assert 1.0 < gigabytes_per_s < 2000.0
