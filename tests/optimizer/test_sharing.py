"""GPUs of one kind measure a share of the operators each; another kind measures none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsched.loading import Model
from onnxsched.profile import OperatorProfile
from onnxsched.profiling import sharing
from onnxsched.profiling.sharing import ProfilingWorkers
from onnxsched.shapes import tensor_types
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError
from support import models

GPUS = [Device("cuda", index) for index in range(3)]


class FakeWorker:
    """Measures at once, or as `fails` says; notes what it was asked for."""

    asked: dict[Device, list[str]]
    fails: BaseException | None = None
    closed: list[FakeWorker]

    def measure(
        self, model: Model, device: Device, nodes: Sequence[onnx.NodeProto], custom_ops: Any
    ) -> Iterator[tuple[str, OperatorProfile]]:
        for node in nodes:
            self.asked.setdefault(device, []).append(node.name)
            if self.fails is not None:
                raise self.fails
            yield node.name, OperatorProfile((float(device.index + 1),))

    def end(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        self.closed.append(self)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "asked", {}, raising=False)
    monkeypatch.setattr(FakeWorker, "closed", [], raising=False)
    monkeypatch.setattr(sharing, "ProfilingWorker", FakeWorker)
    monkeypatch.setattr(cuda, "require_device", lambda device: None)
    kinds = {0: "H200", 1: "A10", 2: "H200"}
    monkeypatch.setattr(cuda, "device_properties", lambda device: {"name": kinds[device.index]})


def _model() -> Model:
    proto = models.fork_join()
    return Model(proto, tensor_types(proto), {}, {}, proto)


@pytest.mark.parametrize(
    ("devices", "alike"),
    [(GPUS[:1], GPUS[:1]), (GPUS[:2], GPUS[:1]), (GPUS, GPUS[::2]), (GPUS[1:], GPUS[1:2])],
)
def test_gpus_like_the_first_share_the_operators(
    devices: list[Device], alike: list[Device]
) -> None:
    model = _model()
    nodes = list(model.proto.graph.node)
    with ProfilingWorkers(devices) as workers:
        found = dict(workers.measure(model, devices[0], nodes, ()))
        assert not list(workers.measure(model, devices[0], [], ()))
    assert found.keys() == {node.name for node in nodes}
    assert list(FakeWorker.asked) == sorted(FakeWorker.asked) == alike
    shares = [len(names) for names in FakeWorker.asked.values()]
    assert max(shares) - min(shares) <= 1
    for device, names in FakeWorker.asked.items():
        assert all(found[name].duration_us == device.index + 1 for name in names)
    assert len(FakeWorker.closed) == len(alike)


@given(error=st.sampled_from([ModelError("refused (planted)."), KeyboardInterrupt()]))
def test_what_one_complains_of_ends_all(error: BaseException) -> None:
    model = _model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeWorker, "fails", error)
        patch.setattr(FakeWorker, "closed", [])
        workers = ProfilingWorkers([GPUS[0], GPUS[2]])
        with pytest.raises(type(error)):
            list(workers.measure(model, GPUS[0], list(model.proto.graph.node), ()))
        assert len(FakeWorker.closed) == 2


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Device) -> None:
        if device.index:
            raise DeviceError(f"Device {device} is not available.")

    monkeypatch.setattr(cuda, "require_device", refuse)
    with pytest.raises(DeviceError, match="cuda:2 is not available"):
        ProfilingWorkers([GPUS[0], GPUS[2]])
