"""Processes with a GPU each, on fakes: threads are processes, and queues are NCCL."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.executors import ranks
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.group import NcclLinks
from onnxsched_runtime.load import Session
from onnxsched_runtime.plan import ExecutionPlan, Receive, Send
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.ranks import on_device, split_plan, spread
from onnxsched_runtime.source import ModelSource
from support.fake_cuda import FakeBuffer, FakeGraph, FakeMemory, install
from support.models import (
    MODELS,
    annotation_of,
    assert_same,
    feeds_for,
    host_reasons,
    model_of,
    reference,
)

CAPTURABLE = [name for name, build in MODELS.items() if not host_reasons(build())]
SECOND = Device("cuda", 1)

pytestmark = pytest.mark.timeout(60, method="thread")


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    return install(monkeypatch)


class FakeLinks(NcclLinks):
    """What a rank issues goes through queues, which others read from."""

    def __init__(self, rank: int, queues: dict[Any, queue.Queue[bytes]], ready: Any) -> None:
        self._rank, self._queues, self._ready = rank, queues, ready

    def wait_until_ready(self) -> None:
        self._ready.wait()

    def issue(self, step: Send | Receive, buffer: cuda.Buffer, stream: cuda.Stream) -> None:
        assert isinstance(buffer, FakeBuffer)
        if isinstance(step, Send):
            buffer.fetch(stream)
            self._queues[self._rank, step.rank, step.tensor].put(buffer.staging.tobytes())
        else:
            content = self._queues[step.rank, self._rank, step.tensor].get(timeout=20)
            buffer.staging.reshape(-1).view("u1")[:] = memoryview(content)
            buffer.upload(stream)


def rank_plans(model: onnx.ModelProto) -> tuple[ModelSource, tuple[ExecutionPlan, ...]]:
    annotation = annotation_of(model, (0, 1), device=Device("cuda"), device_count=2)
    plan = plan_model(model, annotation.placements, {})
    plans = split_plan(plan, spread(annotation.devices, 2), 2)
    plans = (plans[0], on_device(plans[1], Device("cuda", 0)))  # each machine has one GPU
    return ModelSource(model, annotation.tensors), plans


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [job.result() for job in [threads.submit(task) for task in tasks]]


def opened(
    source: ModelSource, plans: Sequence[ExecutionPlan], capture: Capture
) -> list[StreamExecutor]:
    queues = {
        (source, target, tensor): queue.Queue[bytes]()
        for source, plan in enumerate(plans)
        for piece in plan.pieces
        for step in piece.steps
        if isinstance(step, Send)
        for target, tensor in [(step.rank, step.tensor)]
    }
    ready = threading.Barrier(len(plans))
    return together(
        [
            lambda rank=rank, plan=plan: StreamExecutor(  # type: ignore[misc]
                source, plan, capture, (), FakeLinks(rank, queues, ready)
            )
            for rank, plan in enumerate(plans)
        ]
    )


@pytest.mark.parametrize("name", CAPTURABLE)
def test_two_gpus_compute_the_model(name: str, graph: type[FakeGraph]) -> None:
    model = MODELS[name]()
    outputs = [value.name for value in model.graph.output]
    first, second = opened(*rank_plans(model), "whole")
    assert (first.capture, first.refusal) == ("whole", None)
    for seed in range(3):
        feeds = feeds_for(model, seed)
        graph.launches = 0
        results, nothing = together(
            [lambda f=feeds: first.run(f, outputs), lambda: second.run({}, [])]  # type: ignore[misc]
        )
        assert_same(results, reference(model, feeds))
        assert nothing == []
        assert graph.launches  # of two threads, which count past each other
    first.close()
    second.close()


def test_what_no_capture_allows_is_issued_at_every_run(graph: type[FakeGraph]) -> None:
    model = MODELS["fork_join"]()
    graph.refusals = 2
    first, second = opened(*rank_plans(model), "whole")
    assert first.capture == second.capture == "none"
    assert first.refusal == "whole: The capture was refused (planted)."
    feeds = feeds_for(model)
    (results, _) = together([lambda: first.run(feeds, ["y"]), lambda: second.run({}, [])])
    assert_same(results, reference(model, feeds))
    assert graph.launches == 0


def test_what_others_send_is_a_valid_index_while_kernels_warm_up(
    graph: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every place had held something else before, which arenas bring about."""
    allocate = FakeMemory.__init__

    def allocate_used(self: FakeMemory, nbytes: int, device: Device) -> None:
        allocate(self, nbytes, device)
        ctypes.memset(self.pointer, 0x7F, nbytes)

    model = model_of(
        """(float[3] x) => (float[3] y) {
            places = Cast<to = 7>(x)
            y = Gather(table, places)
        }""",
        table=np.arange(4, dtype=np.float32),
    )
    monkeypatch.setattr(FakeMemory, "__init__", allocate_used)
    first, second = opened(*rank_plans(model), "whole")
    feeds = {"x": np.array([3, 0, 2], np.float32)}
    results, _ = together([lambda: first.run(feeds, ["y"]), lambda: second.run({}, [])])
    assert_same(results, reference(model, feeds))
    first.close()
    second.close()


class Alone:
    """The only rank of a group."""

    rank, count = 0, 1

    def __init__(self) -> None:
        self.told: list[str] = []

    def fail(self, sentence: str) -> str:
        self.told.append(sentence)
        return sentence


@pytest.mark.parametrize(
    ("name", "rank_of", "sentence"),
    [
        ("diamond", {Device("cuda"): 0, SECOND: 0}, "2 GPUs; start as many processes, one for"),
        ("branch", {Device("cuda"): 0}, "runs on the host, which several processes with GPUs"),
    ],
)
def test_what_gpus_do_not_allow_is_refused(
    name: str, rank_of: Mapping[Device, int], sentence: str, graph: type[FakeGraph]
) -> None:
    model = MODELS[name]()
    annotation = annotation_of(model, device=Device("cuda"), device_count=len(rank_of))
    membership = ranks.Membership(Alone(), rank_of)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=sentence):
        Session(model, annotation, membership=membership)


def test_a_rank_runs_on_the_gpu_that_its_launcher_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    membership = ranks.Membership(Alone(), {Device("cuda", 5): 0})  # type: ignore[arg-type]
    assert membership.device == SECOND
    on_threads = replace(membership, rank_of={Device("cpu", 5): 0})
    assert on_threads.device == Device("cpu", 5)
