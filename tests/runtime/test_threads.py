"""Streams are threads that run side by side, and events order them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import pytest

from onnxsched_runtime.errors import RunError
from onnxsched_runtime.executors import threads
from onnxsched_runtime.executors.threads import thread_count
from onnxsched_runtime.load import Session
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.ranks import split_plan, spread
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart, ModelSource
from support.models import (
    MODELS,
    annotation_of,
    assert_same,
    diamond,
    feeds_for,
    fork_join,
    reference,
)

Feeds = Mapping[str, Any]


@pytest.mark.timeout(60, method="thread")
def test_two_streams_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diamond()
    meeting = threading.Barrier(2, timeout=20)
    real = OrtSession.run

    def run(self: OrtSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[Any]:
        if set(outputs or ()) & {"left", "right"}:
            meeting.wait()
        return real(self, feeds, outputs)

    monkeypatch.setattr(OrtSession, "run", run)
    with Session(model, annotation_of(model, (1, 1, 2, 1))) as session:
        session.run(None, feeds_for(model))


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("name", MODELS)
def test_groups_of_threads_stand_in_for_devices(name: str) -> None:
    model = MODELS[name]()
    with Session(model, annotation_of(model, (0, 1), device_count=3)) as session:
        for seed in range(3):
            feeds = feeds_for(model, seed)
            assert_same(session.run(None, feeds), reference(model, feeds))


@pytest.mark.timeout(60, method="thread")
def test_each_segment_finds_what_it_reads_however_the_threads_are_delayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = diamond()
    real = OrtSession.run
    finished: list[str] = []

    with Session(model, annotation_of(model, (1, 2, 3, 4))) as session:
        for slow in ("top", "left", "right"):
            finished.clear()

            def run(
                self: OrtSession,
                feeds: Feeds,
                outputs: Sequence[str] | None = None,
                slow: str = slow,
            ) -> list[Any]:
                (output,) = outputs or ()
                if output == slow:
                    threading.Event().wait(0.05)
                results = real(self, feeds, outputs)
                finished.append(output)
                return results

            monkeypatch.setattr(OrtSession, "run", run)
            session.run(None, feeds_for(model))
            assert finished[0] == "top"
            assert finished[-1] == "y"


@pytest.mark.timeout(60, method="thread")
def test_an_error_is_raised_however_late_its_lane_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next run finds all threads idle."""
    model = diamond()
    real, stop = OrtSession.run, threads._LaneRun.stop
    ended: list[str] = []

    def run(self: OrtSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[Any]:
        if "left" in (outputs or ()):
            raise RunError("planted")
        return real(self, feeds, outputs)

    def stop_slowly(self: threads._LaneRun) -> None:
        stop(self)
        threading.Event().wait(0.1)
        ended.append("left")

    monkeypatch.setattr(OrtSession, "run", run)
    monkeypatch.setattr(threads._LaneRun, "stop", stop_slowly)
    with Session(model, annotation_of(model, (1, 2, 3, 1))) as session:
        for count in (1, 2):
            with pytest.raises(RunError, match="planted"):
                session.run(None, feeds_for(model))
            assert len(ended) == count


@pytest.mark.timeout(60, method="thread")
def test_one_stream_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diamond()
    real = OrtSession.run
    callers = set()

    def run(self: OrtSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[Any]:
        callers.add(threading.current_thread())
        return real(self, feeds, outputs)

    monkeypatch.setattr(OrtSession, "run", run)
    with Session(model, annotation_of(model, (5,))) as session:
        session.run(None, feeds_for(model))
    assert callers == {threading.current_thread()}


@pytest.mark.parametrize(
    ("streams", "process_count", "expected"), [((0,), 1, 0), ((0,), 2, 6), ((0, 1), 2, 3)]
)
def test_sessions_that_run_side_by_side_leave_each_other_cores(
    streams: tuple[int, ...],
    process_count: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: set[int] = set()

    class Session(OrtSession):
        def __init__(self, part: ModelPart, settings: SessionSettings) -> None:
            counts.add(settings.thread_count)
            super().__init__(part, settings)

    monkeypatch.setattr(threads, "OrtSession", Session)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    model = diamond()
    annotation = annotation_of(model, streams)
    plan = plan_model(model, annotation.placements, {})
    source = ModelSource(model, annotation.tensors)
    with threads.ThreadExecutor(source, plan, process_count=process_count):
        assert counts == {expected}


@pytest.mark.timeout(60, method="thread")
def test_a_process_of_several_opens_its_own_segments_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fork_join()
    annotation = annotation_of(model, (0, 1), device_count=3)
    plan = plan_model(model, annotation.placements, {})
    weights = {weight.name for weight in model.graph.initializer}
    opened: list[str] = []

    def open_session(part: ModelPart, settings: SessionSettings) -> OrtSession:
        opened.extend(w.name for w in onnx.load_from_string(part.content).graph.initializer)
        return OrtSession(part, settings)

    monkeypatch.setattr(threads, "OrtSession", open_session)
    for number, rank_plan in enumerate(split_plan(plan, spread(annotation.devices, 3), 3)):
        opened.clear()
        source = ModelSource(model, annotation.tensors)
        with threads.ThreadExecutor(source, rank_plan):
            own = {
                name
                for node in model.graph.node
                if annotation.placements[node.name].device.index == number
                for name in node.input
            }
            assert sorted(opened) == sorted(own & weights)


@pytest.mark.parametrize(("cores", "streams", "count"), [(8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_streams_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, streams: int, count: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert thread_count(streams) == count, "of those that this process may use"
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert thread_count(streams) == count


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C does what it does by default; who starts tests in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_run_leaves_no_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diamond()
    before = threading.active_count()
    real = OrtSession.run

    def run(self: OrtSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[Any]:
        if "left" in (outputs or ()):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # meanwhile the caller closes the sessions
        return real(self, feeds, outputs)

    monkeypatch.setattr(OrtSession, "run", run)
    with (
        pytest.raises(KeyboardInterrupt),
        Session(model, annotation_of(model, (1, 2, 3, 4))) as session,
    ):
        session.run(None, feeds_for(model))
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)  # one that was being started ends by itself
    assert threading.active_count() == before
