"""Which devices are scheduled for, and what they hold."""

from __future__ import annotations

import pytest

from onnxsched.environment import choose_device, choose_devices, machine_of, pairs_through_host
from onnxsched.machine import Machine
from onnxsched_runtime import cuda, session
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, UsageError
from support.models import CPU

GPUS = tuple(Device("cuda", index) for index in range(4))


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: 4)
    monkeypatch.setattr(cuda.devices, "device_count", lambda: 4)
    monkeypatch.setattr(session, "is_cuda_built", lambda: True)
    monkeypatch.setattr(cuda, "free_memory_nbytes", lambda device: (device.index << 30) + 5)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", GPUS[:1]),
        ("cuda", GPUS[:1]),
        ("cuda:3", GPUS[3:]),
        ("cuda:2,cuda:0", (GPUS[2], GPUS[0])),
        (" cuda:0, cuda:1 ", GPUS[:2]),
        ("cpu", (CPU,)),
        ("cpu:1,cpu:0", (Device("cpu", 1), CPU)),
    ],
)
def test_devices_are_those_that_are_named_in_that_order(
    text: str, devices: tuple[Device, ...]
) -> None:
    assert choose_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UsageError, "'' is no device"),
        ("cuda:0,,cuda:1", UsageError, "'' is no device"),
        ("auto,cuda:1", UsageError, "'auto' is no device"),
        ("cuda,cuda:0", UsageError, "'cuda,cuda:0' names cuda:0 twice"),
        ("cuda:0,cpu", UsageError, "mixes cuda:0 and cpu:0"),
        ("cuda:0,cuda:4", DeviceError, "cuda:4 is not available: this machine has 4"),
        ("cpu:1", DeviceError, "cpu:1 is not available: the CPU is cpu:0"),
        ("cpu:0,cpu:2", DeviceError, "cpu:2 is not available"),
    ],
)
def test_what_names_no_devices_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_devices(text)


@pytest.mark.parametrize(("gpu_count", "is_built"), [(0, True), (4, False), (0, False), (4, True)])
def test_the_gpu_is_taken_by_itself_where_onnx_runtime_has_it_too(
    gpu_count: int, is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: gpu_count)
    monkeypatch.setattr(session, "is_cuda_built", lambda: is_built)
    assert choose_devices("auto") == (GPUS[0] if gpu_count and is_built else CPU,)


def test_where_one_is_wanted_several_are_refused() -> None:
    assert choose_device("cuda:1") == GPUS[1]
    with pytest.raises(UsageError, match="'cuda:0,cuda:1' names several"):
        choose_device("cuda:0,cuda:1")


def test_several_gpus_are_limited_to_what_is_free_and_one_is_not() -> None:
    assert machine_of(GPUS[1:3], 8) == Machine(GPUS[1:3], 8, {GPUS[1]: 5, GPUS[2]: (1 << 30) + 5})
    assert machine_of(GPUS[:2], 8).room_nbytes(GPUS[0]) == 0
    assert machine_of(GPUS[:1], 8) == Machine(GPUS[:1], 8)
    groups = (CPU, Device("cpu", 1))
    assert machine_of(groups, 2) == Machine(groups, 2)


def test_pairs_without_peer_access_both_ways_go_through_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = {(GPUS[1], GPUS[0]), (GPUS[2], GPUS[3]), (GPUS[3], GPUS[2])}
    monkeypatch.setattr(cuda, "has_peer_access", lambda one, other: (one, other) not in closed)
    assert pairs_through_host(GPUS) == ("cuda:0-cuda:1", "cuda:2-cuda:3")
    assert pairs_through_host(GPUS[:1]) == ()
    assert pairs_through_host((CPU, Device("cpu", 1))) == ()
