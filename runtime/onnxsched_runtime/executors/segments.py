"""The sessions, streams and buffers of a plan on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from onnxsched_runtime import cuda
from onnxsched_runtime.arena import Arena, check_arena, packed, plan_arena
from onnxsched_runtime.device import Placement
from onnxsched_runtime.model import ModelPart, ModelSource
from onnxsched_runtime.plan import ExecutionPlan, Piece, Record, Run, Segment, Wait
from onnxsched_runtime.session import BoundRun, OrtSession
from onnxsched_runtime.settings import BufferView, SessionSettings
from onnxsched_runtime.templates import Template, template_of

_WARM_UP_COUNT = 2
"""Runs before a capture: ORT settles its memory pattern in the second."""


class SegmentRunner:
    """The sessions, streams and buffers of a plan, run by issuing its steps."""

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        *,
        graph_capture: bool = False,
        custom_ops: tuple[str, ...] = (),
    ) -> None:
        """Create them; nothing runs yet.

        Args:
            source: The model that segments are cut out of.
            plan: Says which segments and on which streams.
            graph_capture: Let ORT capture each session by itself.
            custom_ops: Libraries of custom operators.
        """
        self.plan = plan
        self._source = source
        self._device = plan.segments[0].placement.device
        self._resources = ExitStack()
        self._graph_capture, self._custom_ops = graph_capture, custom_ops
        self.streams: dict[Placement, cuda.Stream] = {}
        self.buffers: dict[str, cuda.Buffer] = {}
        self.sessions: dict[int, OrtSession] = {}
        self.bound: dict[int, BoundRun] = {}
        try:
            used = {piece.main for piece in plan.pieces}
            used |= {segment.placement for segment in plan.segments}
            for placement in sorted(used):
                stream = cuda.Stream(placement.device)
                self.streams[placement] = self._resources.enter_context(stream)
            self._open_buffers()
            shared = {} if graph_capture else self._open_shared()
            for index in range(len(plan.segments)):
                if index not in shared:
                    self._open(index)
        except BaseException:
            self.close()
            raise

    def _open_buffers(self) -> None:
        nbytes = {name: self._source.tensors[name].nbytes for name in self.plan.device_tensors}
        arena = plan_arena(self.plan, nbytes)
        check_arena(self.plan, nbytes, arena)
        self.buffers, _ = self._hold(arena)

    def _hold(self, arena: Arena) -> tuple[dict[str, cuda.Buffer], cuda.DeviceMemory]:
        """Memory for an arena, and a buffer for each tensor or weight in it."""
        memory = self._resources.enter_context(cuda.DeviceMemory(arena.nbytes, self._device))
        buffers = {
            name: cuda.Buffer(self._source.kind_of(name), self._device, memory.pointer + offset)
            for name, offset in arena.offsets.items()
        }
        for buffer in buffers.values():
            self._resources.callback(buffer.close)
        return buffers, memory

    def _open(self, index: int) -> None:
        """Make the session of one segment."""
        segment = self.plan.segments[index]
        part = self._source.extract(segment)
        session = self._session(segment, part)
        if segment.host_reason is None:
            self.bound[index] = session.bind(
                {name: _view(self.buffers[name]) for name in segment.inputs},
                {name: _view(self.buffers[name]) for name in segment.outputs},
            )
        else:
            self.sessions[index] = session

    def _open_shared(self) -> set[int]:
        """Make one session for each kind of segments that are equal but for their weights."""
        groups = self._equal_segments()
        weights = {w for group in groups for _, t in group for w in t.weights.values()}
        arena = packed({name: self._source.kind_of(name).nbytes for name in weights})
        held, memory = self._hold(arena)
        for name, offset in arena.offsets.items():
            array = self._source.large_weight(name)
            assert array is not None
            memory.upload(array, offset)
        for group in groups:
            first, template = group[0]
            session = self._session(self.plan.segments[first], template.part)
            for index, template in group:
                inputs = {c: _view(self.buffers[name]) for c, name in template.inputs.items()}
                inputs |= {c: _view(held[name]) for c, name in template.weights.items()}
                outputs = {c: _view(self.buffers[name]) for c, name in template.outputs.items()}
                self.bound[index] = session.bind(inputs, outputs)
        return {index for group in groups for index, _ in group}

    def _equal_segments(self) -> list[list[tuple[int, Template]]]:
        """Segments of one stream that can share a session, two or more at a time."""
        groups: dict[tuple[Placement, bytes], list[tuple[int, Template]]] = {}
        for index, segment in enumerate(self.plan.segments):
            if segment.host_reason:
                continue
            if template := template_of(self._source, segment):
                key = (segment.placement, template.part.content)
                groups.setdefault(key, []).append((index, template))
        return [group for group in groups.values() if len(group) > 1]

    def _session(self, segment: Segment, part: ModelPart) -> OrtSession:
        captured = segment.host_reason is None
        settings = SessionSettings(
            segment.placement.device,
            stream_handle=self.streams[segment.placement].handle if captured else None,
            graph_capture=self._graph_capture and captured,
            host_operators=not captured,
            custom_ops=self._custom_ops,
            variant=self._source.variant,
            is_lowered=self._source.variant.is_lowered,
        )
        session = OrtSession(part, settings)
        self._resources.callback(session.close)
        return session

    def warm_up(self, piece: Piece) -> None:
        """Run a captured piece alone, segment after segment, until ORT's memory has settled."""
        for index in piece.runs:
            for _ in range(_WARM_UP_COUNT):
                self.bound[index].launch()
                self.streams[self.plan.segments[index].placement].synchronize()

    def clear(self, piece: Piece) -> None:
        """Zero what a host piece writes, for warming up what reads it.

        The memory is shared, and what lay there before may be no valid index.
        """
        stream = self.streams[piece.main]
        for index in piece.runs:
            for name in self.plan.segments[index].outputs:
                if name in self.buffers:
                    buffer = self.buffers[name]
                    buffer.fill(np.zeros_like(buffer.staging), stream)
        stream.synchronize()

    def issue(self, piece: Piece) -> None:
        """Issue the steps of a captured piece on its streams."""
        events: dict[int, cuda.Event] = {}
        for step in piece.steps:
            match step:
                case Run(index):
                    self.bound[index].launch()
                case Record(event, placement):
                    events[event] = self.streams[placement].record()
                case Wait(event, placement):
                    self.streams[placement].wait(events[event])

    def capture(
        self, piece: Piece, uploads: Sequence[str] = (), fetches: Sequence[str] = ()
    ) -> cuda.Graph:
        """Capture a piece into one CUDA graph; the sessions must be warm.

        Args:
            piece: What the graph runs.
            uploads: Tensors that it first copies from pinned memory.
            fetches: Tensors that it copies to pinned memory in the end.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        main = self.streams[piece.main]
        for name in (*uploads, *fetches):
            _ = self.buffers[name].staging  # allocated now: a capture forbids it

        def issue_all() -> None:
            for name in uploads:
                self.buffers[name].upload(main)
            self.issue(piece)
            for name in fetches:
                self.buffers[name].fetch(main)

        return cuda.Graph.capture(main, issue_all)

    def close(self) -> None:
        """Free the sessions, then the streams they launch on."""
        try:
            if self.streams:
                cuda.synchronize(self._device)
        finally:
            self.bound, self.sessions, self.buffers = {}, {}, {}
            self._resources.close()


def _view(buffer: cuda.Buffer) -> BufferView:
    kind = buffer.kind
    return BufferView(buffer.pointer, buffer.device, kind.element_type, kind.shape or ())
