"""Transfers are measured once for each pair of devices, and kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from onnxsched.profiling import transfers
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.transfers import SIZES_NBYTES, Transfers, measure_transfers
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device

GROUPS = tuple(Device("cpu", number) for number in range(3))
GPUS = tuple(Device("cuda", number) for number in range(3))


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path, "this machine")


def measured(devices: tuple[Device, ...], cache: MeasurementCache) -> Transfers:
    return measure_transfers(devices, cache, lambda what, done, total: None)


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Device, Device]]:
    """GPUs whose copies take longer the higher their target, and the first has no peers."""
    asked: list[tuple[Device, Device]] = []

    def time_copies_us(
        source: Device, target: Device, nbytes: int, count: int
    ) -> tuple[float, ...]:
        asked.append((source, target))
        return (8.0 + target.index + nbytes / 1e5,) * count

    monkeypatch.setattr(cuda, "time_copies_us", time_copies_us)
    monkeypatch.setattr(cuda, "has_peer_access", lambda one, other: GPUS[0] not in (one, other))
    monkeypatch.setattr(cuda, "device_properties", lambda device: {"name": "some GPU"})
    return asked


def test_one_device_has_none(cache: MeasurementCache) -> None:
    assert measured(GROUPS[:1], cache) == {}


def test_groups_of_threads_share_one_curve(
    cache: MeasurementCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = measured(GROUPS, cache)
    assert curves.keys() == {*permutations(GROUPS, 2)}
    assert len(set(curves.values())) == 1
    curve = curves[GROUPS[0], GROUPS[1]]
    assert tuple(nbytes for nbytes, _ in curve.points) == SIZES_NBYTES
    assert curve.us(64 << 20) > curve.us(4096) > 0
    monkeypatch.delattr(transfers, "_measured")
    assert measured(GROUPS, cache) == curves


def test_every_ordered_pair_of_gpus_has_its_own(
    cache: MeasurementCache, links: list[tuple[Device, Device]]
) -> None:
    curves = measured(GPUS, cache)
    assert set(links) == curves.keys() == {*permutations(GPUS, 2)}
    for (source, target), curve in curves.items():
        assert curve.us(4096) == pytest.approx(8.0 + target.index + 4096 / 1e5)
        assert curve.is_peer == (GPUS[0] not in (source, target))
    links.clear()
    assert measured(GPUS[1:], cache) == {
        pair: curve for pair, curve in curves.items() if GPUS[0] not in pair
    }
    assert links == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("points"),
        lambda content: content.update(points=[]),
        lambda content: content.update(points=[[4096, 9.0], [4096, 8.0]]),
        lambda content: content.update(points=None),
    ],
)
def test_a_damaged_curve_is_measured_again(
    cache: MeasurementCache,
    links: list[tuple[Device, Device]],
    damage: Callable[[dict[str, Any]], Any],
) -> None:
    pair = GPUS[:2]
    curves = measured(pair, cache)
    key = transfers._key(*pair)
    content = cache.read(key)
    damage(content)
    cache.write(key, content)
    links.clear()
    assert measured(pair, cache) == curves
    assert set(links) == {pair}
