"""The sessions, streams and buffers of a plan on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Placement
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.plan import ExecutionPlan, Piece, Record, Run, Wait
from onnxsched_runtime.session import BufferView, OrtSession, SessionSettings

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
        self._device = plan.segments[0].placement.device
        self._resources = ExitStack()
        self._custom_ops = custom_ops
        self.streams: dict[Placement, cuda.Stream] = {}
        try:
            used = {piece.main for piece in plan.pieces}
            used |= {segment.placement for segment in plan.segments}
            self.streams = {
                placement: self._resources.enter_context(cuda.Stream(placement.device))
                for placement in sorted(used)
            }
            self.buffers = {
                name: cuda.Buffer(source.tensors[name], self._device)
                for name in sorted(plan.device_tensors)
            }
            cuda.synchronize(self._device)  # torch cleared the buffers on a stream of its own
            self.sessions = [
                self._open(source, index, graph_capture) for index in range(len(plan.segments))
            ]
        except BaseException:
            self.close()
            raise

    def _open(self, source: ModelSource, index: int, graph_capture: bool) -> OrtSession:
        segment = self.plan.segments[index]
        captured = segment.host_reason is None
        settings = SessionSettings(
            segment.placement.device,
            stream_handle=self.streams[segment.placement].handle if captured else None,
            graph_capture=graph_capture and captured,
            host_operators=not captured,
            custom_ops=self._custom_ops,
            variant=source.variant,
            is_lowered=source.variant.is_lowered,
        )
        session = OrtSession(source.extract(segment), settings)
        self._resources.callback(session.close)
        if captured:
            session.bind(self._views(segment.inputs), self._views(segment.outputs))
        return session

    def _views(self, names: Sequence[str]) -> dict[str, BufferView]:
        buffers = {name: self.buffers[name] for name in names}
        return {
            name: BufferView(b.pointer, b.device, b.kind.element_type, b.kind.shape or ())
            for name, b in buffers.items()
        }

    def warm_up(self, piece: Piece) -> None:
        """Run a captured piece alone, segment after segment, until ORT's memory has settled."""
        for index in piece.runs:
            for _ in range(_WARM_UP_COUNT):
                self.sessions[index].run_bound()
                self.streams[self.plan.segments[index].placement].synchronize()

    def issue(self, piece: Piece) -> None:
        """Issue the steps of a captured piece on its streams."""
        events: dict[int, cuda.Event] = {}
        for step in piece.steps:
            match step:
                case Run(index):
                    self.sessions[index].run_bound()
                case Record(event, placement):
                    events[event] = self.streams[placement].record()
                case Wait(event, placement):
                    self.streams[placement].wait(events[event])

    def capture(self, piece: Piece) -> cuda.Graph:
        """Capture a piece into one CUDA graph; the sessions must be warm.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        return cuda.Graph.capture(self.streams[piece.main], lambda: self.issue(piece))

    def close(self) -> None:
        """Free the sessions, then the streams they launch on."""
        try:
            if self.streams:
                cuda.synchronize(self._device)
        finally:
            self._resources.close()
            self.buffers = {}
