"""A session for every segment, launched one by one: for what can't be one graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.executors.runner import WARM_UP_COUNT, CopyRun, FusedRun, PlanRunner, view
from onnxsched_runtime.group import NcclLinks
from onnxsched_runtime.moves import Place
from onnxsched_runtime.plan import ExecutionPlan, Piece, Receive, Record, Run, Send, Wait
from onnxsched_runtime.session import BoundRun
from onnxsched_runtime.source import ModelSource


class SegmentRunner(PlanRunner):
    """Runs the segments of a plan by issuing its steps on the streams of their placements."""

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        *,
        graph_capture: bool = False,
        custom_ops: tuple[str, ...] = (),
        links: NcclLinks | None = None,
        in_place: bool = True,
    ) -> None:
        """Create streams, buffers and sessions; nothing runs yet.

        Args:
            source: The model that segments are cut out of.
            plan: Says which segments and on which streams.
            graph_capture: Let ORT capture each session by itself.
            custom_ops: Libraries of custom operators.
            links: To other processes, where the plan sends and receives.
            in_place: Let pieces of tensors lie in these, where nothing has to move them then.
        """
        self._links = links
        self._is_in_place = in_place
        self.bound: dict[int, BoundRun | CopyRun | FusedRun] = {}
        super().__init__(source, plan, custom_ops, graph_capture)

    def _tensors(self) -> dict[str, Device]:
        return {name: self.plan.device_of[name] for name in self.plan.device_tensors}

    def _inside(self) -> Mapping[str, Place]:
        return super()._inside() if self._is_in_place else {}

    def _open_runs(self) -> None:
        segments = self.plan.segments
        self._open_fused([index for index, segment in enumerate(segments) if segment.is_fused])
        for index, segment in enumerate(segments):
            if self.plan.is_copy(index):
                source, target = (self.buffers[t] for t in (*segment.inputs, *segment.outputs))
                self.bound[index] = CopyRun(source, target, self.streams[segment.placement])
            elif segment.is_fused:
                self.bound[index] = self._fused_run(index, self.buffers)
            elif segment.host_reason is None:
                part = self._source.extract(segment, self.plan.copies)
                session = self._session(
                    segment.placement,
                    part,
                    on_device=True,
                    keeps_nodes=self._source.is_lowered,
                )
                self.bound[index] = session.bind(
                    {
                        self.plan.original(name): view(self.buffers[name])
                        for name in segment.inputs
                    },
                    {name: view(self.buffers[name]) for name in segment.outputs},
                )

    def prepare(self, piece: Piece) -> None:
        """Run a captured piece segment after segment; zero what the host or other ranks write.

        The memory is shared, and what lay there before may be no valid index.
        """
        for step in piece.steps:
            match step:
                case Run(index) if piece.captured:
                    for _ in range(WARM_UP_COUNT):
                        self.bound[index].launch()
                        self.streams[self.plan.segments[index].placement].synchronize()
                case Run(index):
                    self.clear(self.plan.segments[index].outputs, piece)
                case Receive(tensor, _, _):
                    self.clear((tensor,), piece)

    def clear(self, tensors: Iterable[str], piece: Piece) -> None:
        """Zero tensors that lie on GPUs, and wait until they are zero."""
        stream = self.streams[piece.main]
        for name in tensors:
            if name in self.buffers:
                self.buffers[name].clear(stream)
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
                case Send(tensor, _, placement) | Receive(tensor, _, placement):
                    assert self._links is not None
                    self._links.issue(step, self.buffers[tensor], self.streams[placement])
                case Wait(event, placement):
                    self.streams[placement].wait(events[event])

    def close(self) -> None:
        """Free bindings, which hold their sessions, then those and the streams."""
        self.bound = {}
        super().close()
