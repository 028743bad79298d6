"""The CPU executor: the plan over worker threads, one for each stream."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Self

from onnx.helper import tensor_dtype_to_np_dtype

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ModelError, UsageError
from onnxsched_runtime.executors.workers import Worker
from onnxsched_runtime.group import GlooLinks
from onnxsched_runtime.plan import ExecutionPlan, Piece, Receive, Record, Run, Send, Step, Wait
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource

_POLL_S = 0.1
"""How often who waits looks whether it still has to."""


@dataclass
class _LaneRun:
    """What the lanes of one run share; none of it is left locked where Ctrl-C strikes."""

    values: dict[str, Any]
    events: Mapping[int, tuple[SimpleQueue[None], int]]
    """For each event a queue, written in C, and how many lanes wait for something in it."""
    ended: list[BaseException | None] = field(default_factory=list)
    """How each lane ended, in that order."""
    wakes: SimpleQueue[None] = field(default_factory=SimpleQueue)
    """Something for each lane that has ended."""
    is_stopped: bool = False
    """No lane goes on, or waits for another that does not."""

    def record(self, event: int) -> None:
        """Let all go on that wait for an event."""
        wakes, waiting_count = self.events[event]
        for _ in range(waiting_count):
            wakes.put(None)

    def wait(self, event: int) -> None:
        """Wait for an event, or until no lane goes on."""
        wakes, _ = self.events[event]
        while not self.is_stopped:
            with suppress(Empty):
                return wakes.get(timeout=_POLL_S)

    def stop(self) -> None:
        """Let no lane go on."""
        self.is_stopped = True
        for event in self.events:
            self.record(event)

    def wait_for(self, lane_count: int) -> None:
        """Wait until so many lanes have ended."""
        while len(self.ended) < lane_count:
            with suppress(Empty):  # Ctrl-C may have come between a wake and this
                self.wakes.get(timeout=_POLL_S)


class ThreadExecutor:
    """Runs a plan on the CPU provider; streams are threads, and events are queues."""

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

        Raises:
            ModelError: ONNX Runtime refuses a segment, or would have to hand over a type that
                numpy does not have.
        """
        _require_arrays(source, plan)
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
        self._resources = ExitStack()
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
            widest = max((len(lanes) for lanes in self._lanes), default=0)
            needed = max(0, widest - 1) if links is None else widest
            self._workers = [self._resources.enter_context(Worker()) for _ in range(needed)]
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

        Ctrl-C may strike anywhere in this thread, but nothing interrupts who waits for another
        process.
        """
        if os.getpid() != self._process:
            raise UsageError(
                "The session was loaded before this process was forked, which leaves threads "
                "behind; load the model in each process."
            )
        steps = [step for lane in lanes for step in lane]
        waits = Counter(step.event for step in steps if isinstance(step, Wait))
        records = [step.event for step in steps if isinstance(step, Record)]
        run = _LaneRun(values, {event: (SimpleQueue(), waits[event]) for event in records})
        own, others = (lanes[:1], lanes[1:]) if self._links is None else ([], lanes)
        try:
            for worker, lane in zip(self._workers, others, strict=False):
                worker.hand(partial(self._run_to_its_end, lane, run))
            for lane in own:
                self._run_lane(lane, run)
            run.wait_for(len(others))
        except BaseException:  # the caller may close the sessions next, which waits for the lanes
            run.stop()
            raise
        if errors := [error for error in run.ended if error is not None]:
            run.ended.clear()
            try:
                raise errors[0]
            finally:
                del errors  # which holds this frame, and all values with it

    def _run_to_its_end(self, lane: Sequence[Step], run: _LaneRun) -> None:
        error: BaseException | None = None
        try:
            self._run_lane(lane, run)
        except BaseException as raised:
            error = raised
            run.stop()
        run.ended.append(error)
        run.wakes.put(None)

    def _run_lane(self, steps: Sequence[Step], run: _LaneRun) -> None:
        for step in steps:
            match step:
                case Run(index):
                    self._run_segment(index, run.values)
                case Send(tensor):
                    assert self._links is not None
                    self._links.send(step, run.values[tensor])
                case Receive(tensor):
                    assert self._links is not None
                    run.values[tensor] = self._links.receive(step)
                case Record(event):
                    run.record(event)
                case Wait(event):
                    run.wait(event)
            if run.is_stopped:
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


def _require_arrays(source: ModelSource, plan: ExecutionPlan) -> None:
    """Check that arrays can hold all that goes in and out of segments."""
    for name in (plan.original(t) for s in plan.segments for t in (*s.inputs, *s.outputs)):
        kind = source.tensors.get(name)
        if kind is not None and tensor_dtype_to_np_dtype(kind.element_type).isbuiltin != 1:
            raise ModelError(f"'{name}' is a {kind}, which can't be run on the CPU; use a GPU.")


def thread_count(stream_count: int) -> int:
    """Threads for each operator when `stream_count` run side by side, at least 1.

    Of the cores that this process may use, where the system tells.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    core_count = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    return max(1, core_count // stream_count)
