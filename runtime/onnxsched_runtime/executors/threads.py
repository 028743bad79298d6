"""The CPU executor: the plan over worker threads, one for each stream."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from copy import copy
from typing import Any, Self

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.group import GlooLinks
from onnxsched_runtime.plan import ExecutionPlan, Piece, Receive, Record, Run, Send, Step, Wait
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource


class ThreadExecutor:
    """Runs a plan on the CPU provider; streams are threads and events are `threading.Event`."""

    capture = "none"
    refusal: str | None = None

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        custom_ops: tuple[str, ...] = (),
        links: GlooLinks | None = None,
        process_count: int = 1,
    ) -> None:
        """Create the sessions and the threads.

        Args:
            source: The model that sessions are cut out of.
            plan: Says which segments and on which streams.
            custom_ops: Libraries of custom operators.
            links: To other processes, where the plan sends and receives.
            process_count: How many processes share this machine's cores.
        """
        self._plan = plan
        self._links = links
        self._process = os.getpid()
        self._lanes = [_lanes_of(plan, piece) for piece in plan.pieces]
        """The steps of each piece by stream."""
        self._reads = [
            tuple((plan.original(name), name) for name in segment.inputs)
            for segment in plan.segments
        ]
        """What each segment calls what it reads, and what the plan does."""
        stream_count = process_count * len({s.placement for s in plan.segments})
        thread_limit = max((len(lanes) for lanes in self._lanes), default=1)
        self._resources = ExitStack()
        self._threads = self._resources.enter_context(ThreadPoolExecutor(max(1, thread_limit)))
        settings = SessionSettings(
            Device("cpu"),
            thread_count=thread_count(stream_count) if stream_count > 1 else 0,
            custom_ops=custom_ops,
        )
        try:
            self._sessions = {
                index: self._resources.enter_context(
                    OrtSession(source.extract(segment, plan.copies), settings)
                )
                for index, segment in enumerate(plan.segments)
                if not plan.is_copy(index)
            }
        except BaseException:
            self._resources.close()
            raise

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run every piece and return the named outputs as host values.

        Raises:
            UsageError: This is a fork of the process that the model was loaded in.
        """
        values = dict(feeds)
        for lanes in self._lanes:
            if len(lanes) > 1 or self._links is not None:
                self._run_lanes(lanes, values)  # who waits for others can't be interrupted here
                continue
            for step in (step for lane in lanes for step in lane):
                if isinstance(step, Run):
                    self._run_segment(step.segment, values)
        return [values[name] for name in outputs]

    def _run_lanes(self, lanes: Sequence[Sequence[Step]], values: dict[str, Any]) -> None:
        """Run lanes side by side, the first in this thread unless it may wait for processes.

        Nothing interrupts who waits for another process.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "The session was loaded before this process was forked, which leaves threads "
                "behind; load the model in each process."
            )
        steps = (step for lane in lanes for step in lane)
        events = {s.event: threading.Event() for s in steps if isinstance(s, Record)}
        failed = threading.Event()

        def stop() -> None:
            """Let no lane go on, or wait for another that does not."""
            failed.set()
            for event in events.values():
                event.set()

        def run(lane: Sequence[Step]) -> None:
            try:
                self._run_lane(lane, values, events, failed)
            except BaseException:
                stop()
                raise

        own = lanes[0] if self._links is None else ()
        jobs: list[Future[None]] = []
        try:
            for lane in lanes[1:] if self._links is None else lanes:
                jobs.append(self._threads.submit(run, lane))
            run(own)
            wait(jobs)
        except BaseException:  # Ctrl-C, or the own lane: the caller may close the sessions next
            stop()
            if self._links is None:  # else who waits for others is freed when those hear of it
                wait(jobs)
            raise
        for job in jobs:
            job.result()

    def _run_lane(
        self,
        steps: Sequence[Step],
        values: dict[str, Any],
        events: dict[int, threading.Event],
        failed: threading.Event,
    ) -> None:
        for step in steps:
            match step:
                case Run(index):
                    self._run_segment(index, values)
                case Send(tensor):
                    assert self._links is not None
                    self._links.send(step, values[tensor])
                case Receive(tensor):
                    assert self._links is not None
                    values[tensor] = self._links.receive(step)
                case Record(event):
                    if event in events:
                        events[event].set()
                case Wait(event):
                    if event in events:
                        events[event].wait()
            if failed.is_set():
                return

    def _run_segment(self, index: int, values: dict[str, Any]) -> None:
        if self._links is None:
            self._compute(index, values)
        else:
            with self._links.computing():
                self._compute(index, values)

    def _compute(self, index: int, values: dict[str, Any]) -> None:
        outputs = self._plan.segments[index].outputs
        session = self._sessions.get(index)
        if session is None:
            ((_, source),), (target,) = self._reads[index], outputs
            values[target] = copy(values[source])
            return
        feeds = {own: values[name] for own, name in self._reads[index]}
        values.update(zip(outputs, session.run(feeds, outputs), strict=True))

    def close(self) -> None:
        """Free sessions and threads."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lanes_of(plan: ExecutionPlan, piece: Piece) -> list[list[Step]]:
    lanes: dict[Placement, list[Step]] = {}
    for step in piece.steps:
        lanes.setdefault(plan.placement_of(step), []).append(step)
    return list(lanes.values())


def thread_count(stream_count: int) -> int:
    """Threads for each operator when `stream_count` run side by side, at least 1.

    Of the cores that this process may use, where the system tells.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    core_count = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    return max(1, core_count // stream_count)
