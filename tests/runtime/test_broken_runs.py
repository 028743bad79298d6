"""Errors and interrupts at any point free what was taken, and leave no run behind the next."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import AnnotationError, OnnxschedError, RunError, UsageError
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.executors.workers import Worker
from onnxsched_runtime.load import Session
from support import fake_cuda, models

GPU = Device("cuda")


class Counted(fake_cuda.FakeStream):
    """Says how many of its kind are open, and what was done with each."""

    made: list[Counted]
    log: list[tuple[str, int]]

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.number = len(self.made)
        self.made.append(self)

    def synchronize(self) -> None:
        self.log.append(("awaited", self.number))


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[fake_cuda.FakeGraph]:
    graph = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(fake_cuda.FakeMemory, "live", {})
    monkeypatch.setattr(cuda, "Stream", Counted)
    monkeypatch.setattr(Counted, "made", [], raising=False)
    monkeypatch.setattr(Counted, "log", [], raising=False)
    fake_cuda.take_tensors_for_gpus(monkeypatch)
    return graph


def left() -> tuple[int, int, int]:
    """Blocks of memory, graphs and streams that are open."""
    open_count = sum(stream.is_open for stream in Counted.made)
    return len(fake_cuda.FakeMemory.live), fake_cuda.FakeGraph.open_count, open_count


def opened(capture: Capture = "whole", device_count: int = 1) -> Session:
    model = models.fork_join()
    annotation = models.annotation_of(model, device=GPU, device_count=device_count)
    return Session(model, annotation, capture=capture)


@pytest.mark.parametrize("capture", ["whole", "none"])
def test_an_interrupt_while_torch_is_loaded_at_the_end_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capture: Capture
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda, "load_torch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened(capture)
    assert Counted.made
    assert left() == (0, 0, 0)


@pytest.mark.parametrize("error", [OnnxschedError("planted"), KeyboardInterrupt()])
def test_closing_frees_all_whatever_fails(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(device: Device) -> None:
        raise error

    session = opened(device_count=2)
    assert min(left()) > 0
    monkeypatch.setattr(cuda, "synchronize", fail)
    with pytest.raises(type(error)):
        session.close()
    assert left() == (0, 0, 0)


def test_a_broken_run_is_awaited_on_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("none") as session:
        assert isinstance(session.executor, StreamExecutor)
        runner: Any = session.executor._runner
        last = max(runner.bound)

        def fail() -> None:
            raise RunError("planted")

        planted = type("Planted", (), {"launch": staticmethod(fail)})
        monkeypatch.setitem(runner.bound, last, planted)
        Counted.log.clear()
        with pytest.raises(RunError):
            session.run(None, models.feeds_for(models.fork_join()))
        streams = {stream.number for stream in runner.streams.values()}
        assert len(streams) > 1
        assert {number for _, number in Counted.log} == streams


def test_results_that_are_written_are_awaited_before_they_are_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.two_towers()
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in models.feeds_for(model).items()}
    copied = fake_cuda.FakeBuffer.copy_to_tensor

    def copy_once(self: fake_cuda.FakeBuffer, tensor: Any, stream: Any) -> None:
        if Counted.log:
            raise KeyboardInterrupt
        copied(self, tensor, stream)
        Counted.log.append(("written", stream.number))

    with Session(model, models.annotation_of(model, device=GPU)) as session:
        monkeypatch.setattr(fake_cuda.FakeBuffer, "copy_to_tensor", copy_once)
        Counted.log.clear()
        with pytest.raises(KeyboardInterrupt):
            session.run(None, tensors)
        (_, writer), *after = Counted.log
        assert ("awaited", writer) in after


def test_a_schedule_without_the_type_of_a_tensor_is_damaged() -> None:
    model = models.fork_join()
    annotation = models.annotation_of(model, device=GPU)
    tensors = {name: kind for name, kind in annotation.tensors.items() if name != "stem"}
    with pytest.raises(AnnotationError, match=r"damaged \('stem' is missing\)"):
        Session(model, replace(annotation, tensors=tensors))
    assert left() == (0, 0, 0)


@contextlib.contextmanager
def handled(handler: Any) -> Iterator[None]:
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_signal_handler_can_neither_run_nor_close_what_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.diamond()
    feeds = models.feeds_for(model)
    said: list[str] = []
    session = Session(model, models.annotation_of(model, (0,)))
    real = session.executor.run

    def handler(*_: object) -> None:
        for call in (session.close, lambda: session.run(None, feeds)):
            with pytest.raises(UsageError, match="in the middle of a run") as caught:
                call()
            said.append(str(caught.value))

    def interrupted(*arguments: Any) -> list[Any]:
        signal.raise_signal(signal.SIGUSR1)
        return list(real(*arguments))

    monkeypatch.setattr(session.executor, "run", interrupted)
    with handled(handler):
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))
    assert len(said) == 2
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(None, feeds)


def test_a_worker_that_is_interrupted_when_it_starts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def interrupted(self: threading.Thread) -> None:
        start(self)
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Worker()
    (thread,) = started
    thread.join(10)
    assert not thread.is_alive()
