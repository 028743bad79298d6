"""A session for every stream of a piece, and one graph of what they launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

from onnxsched_runtime import cuda
from onnxsched_runtime.arena import ALIGNMENT_NBYTES, Touched, packed
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.runner import WARM_UP_COUNT, CopyRun, FusedRun, PlanRunner, view
from onnxsched_runtime.lanes import (
    MARK,
    MARK_SOURCE,
    Lane,
    LanePlan,
    lane_tensors,
    lanes_of,
    marked_part,
    shared_weights,
    touched_places,
    written_instead,
)
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.plan import ExecutionPlan, Piece
from onnxsched_runtime.session import BoundRun, OrtSession
from onnxsched_runtime.wiring import Point, wire


class LaneRunner(PlanRunner):
    """Captures each stream of a piece as one run of one session, and wires the runs together.

    Nothing runs at the same time until the graph does, so all sessions of a device launch on one
    stream.
    """

    def __init__(
        self, source: ModelSource, plan: ExecutionPlan, custom_ops: tuple[str, ...] = ()
    ) -> None:
        """Create buffers and sessions; nothing runs yet.

        Args:
            source: The model that sessions are cut out of, lowered where that can be.
            plan: Says which segments and on which streams.
            custom_ops: Libraries of custom operators.
        """
        self._chains: dict[Lane, cuda.Chain] = {}
        self._lanes: dict[Piece, LanePlan] = {
            p: lanes_of(plan, p) for p in plan.pieces if p.captured
        }
        self._opened: dict[Lane, OrtSession] = {}
        self._runs: dict[Lane, BoundRun | CopyRun | FusedRun] = {}
        self._marks: dict[Device, list[cuda.Buffer]] = {}
        self._shared: dict[Lane, tuple[str, ...]] = {}
        self._workspaces: dict[Lane, cuda.DeviceMemory] = {}
        super().__init__(source, plan, lane_tensors(plan), custom_ops)

    def _open_streams(self, placements: Sequence[Placement]) -> None:
        opened: dict[Device, cuda.Stream] = {}
        for placement in placements:
            if placement.device not in opened:
                stream = self._resources.enter_context(cuda.graph_stream(placement.device))
                opened[placement.device] = stream
            self.streams[placement] = opened[placement.device]

    def _touched(self) -> Touched:
        return touched_places(self._source, self.plan, self._session_lanes)

    @cached_property
    def _all_lanes(self) -> list[Lane]:
        return [lane for plan in self._lanes.values() for lane in plan.lanes]

    @cached_property
    def _session_lanes(self) -> list[Lane]:
        """What sessions run: neither copies nor fused convolutions."""
        lanes = self._all_lanes
        return [lane for lane in lanes if not self._is_copy(lane) and not self._is_fused(lane)]

    def _open_runs(self) -> None:
        self._shared = shared_weights(self._source, self.plan, self._session_lanes)
        for lane in self._session_lanes:
            for name in self._shared[lane]:
                self._open_weight(name, lane.placement.device)
            self._opened[lane] = self._session(
                lane.placement,
                marked_part(self._source, self.plan, lane, self._shared[lane]),
                on_device=True,
                keeps_nodes=self._source.is_lowered or bool(lane.marks),
            )
            self._open_marks(lane)
        self._runs = {lane: self._bound(lane, self.buffers) for lane in self._all_lanes}

    def _is_copy(self, lane: Lane) -> bool:
        """Whether it is a copy, which has a stream of its own."""
        return self.plan.is_copy(lane.segments[0])

    def _is_fused(self, lane: Lane) -> bool:
        return self.plan.segments[lane.segments[0]].is_fused

    def _open_weight(self, name: str, device: Device) -> None:
        """Upload a weight once, for all sessions of a device."""
        array = self._source.large_weight(name)
        if array is not None:
            self._upload(name, array, device, self._weights)

    def _open_marks(self, lane: Lane) -> None:
        """What the marks of a lane copy from, and what each copies to, once for all lanes."""
        device = lane.placement.device
        marks = self._marks.setdefault(device, [])
        missing = range(len(marks), 1 + len(lane.marks))
        memory = cuda.DeviceMemory(len(missing) * ALIGNMENT_NBYTES, device)
        start = self._resources.enter_context(memory).pointer
        marks += [
            cuda.Buffer(MARK, device, start + number * ALIGNMENT_NBYTES)
            for number in range(len(missing))
        ]

    def _bound(self, lane: Lane, buffers: dict[str, cuda.Buffer]) -> BoundRun | CopyRun | FusedRun:
        if self._is_copy(lane):
            source, target = (buffers[name] for name in (*lane.inputs, *lane.outputs))
            return CopyRun(source, target, self.streams[lane.placement])
        if self._is_fused(lane):
            return self._fused_run(lane.segments[0], buffers)
        inputs = {self.plan.original(name): view(buffers[name]) for name in lane.inputs}
        device = lane.placement.device
        inputs |= {name: view(self._weights[device, name]) for name in self._shared[lane]}
        outputs = {name: view(buffers[name]) for name in lane.outputs}
        for name, origin in written_instead(self._source, self.plan, lane).items():
            shape = self._source.tensors[origin].shape
            outputs[origin] = replace(outputs.pop(name), shape=shape or ())
        marks = self._marks[device]
        for number, mark in enumerate(lane.marks, 1):
            inputs[MARK_SOURCE] = view(marks[0])
            outputs[mark] = view(marks[number])
        return self._opened[lane].bind(inputs, outputs)

    def prepare(self, piece: Piece) -> None:
        """Run each lane by itself, on memory that nothing shares.

        What others have not computed yet is zero, which is a valid index; in the arena it would
        be whatever lay there before.
        """
        if not piece.captured:
            return
        with ExitStack() as scratch:
            buffers: dict[str, cuda.Buffer] = {}
            for device in self.plan.devices:
                nbytes = {
                    name: buffer.kind.nbytes
                    for name, buffer in self.buffers.items()
                    if self.plan.device_of[name] == device
                }
                buffers |= self._buffers_in(packed(nbytes), device, scratch)
            for lane in self._lanes[piece].lanes:
                run = self._bound(lane, buffers)
                for _ in range(WARM_UP_COUNT):
                    run.launch()
                self.streams[lane.placement].synchronize()

    def capture(
        self, piece: Piece, uploads: Sequence[str] = (), fetches: Sequence[str] = ()
    ) -> cuda.Graph:
        """Put a prepared piece together as one CUDA graph.

        Lanes are captured once; putting them together in any order takes milliseconds.

        Args:
            piece: What the graph runs: a piece of the plan, or one of the same lanes that orders
                whatever that one orders.
            uploads: Tensors that it first copies from pinned memory.
            fetches: Tensors that it copies to pinned memory in the end.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        stream = self.streams[piece.main]
        plan = self._lanes.get(piece) or lanes_of(self.plan, piece)
        into, out = len(plan.lanes), len(plan.lanes) + 1  # the chains of copies, after the lanes
        ends = [Point(number, len(lane.segments)) for number, lane in enumerate(plan.lanes)]
        waits = [
            *plan.waits,
            *((Point(into, 1), Point(lane, 0)) for lane in plan.starts),
            *((end, Point(out, 0)) for end in ends),
        ]
        positions = [*plan.positions, (-1,), (len(piece.steps),)]
        uploaded, fetched = ([self.buffers[n] for n in names] for names in (uploads, fetches))
        with ExitStack() as owner:
            chains = [self._chain(lane) for lane in plan.lanes]
            chains.append(owner.enter_context(_copies(stream, uploaded, cuda.Buffer.upload)))
            chains.append(owner.enter_context(_copies(stream, fetched, cuda.Buffer.fetch)))
            wired = wire([chain.nodes for chain in chains], positions, waits)
            workspaces = [
                self._workspace(lane, chain.workspace_nbytes)
                for lane, chain in zip(plan.lanes, chains, strict=False)
            ]
            return cuda.Graph.assemble(chains, wired, [*workspaces, 0, 0])

    def _chain(self, lane: Lane) -> cuda.Chain:
        """What a lane launches, captured when first asked for."""
        if lane not in self._chains:
            marks = self._marks.get(lane.placement.device, [])
            addresses = {marks[n].pointer: n for n in range(1, 1 + len(lane.marks))}
            stream = self.streams[lane.placement]
            chain = cuda.Chain.capture(stream, self._runs[lane].launch, addresses)
            self._chains[lane] = self._resources.enter_context(chain)
        return self._chains[lane]

    def _workspace(self, lane: Lane, nbytes: int) -> int:
        """Memory for what a run allocates; runs of one lane never overlap."""
        held = self._workspaces.get(lane)
        if held is None or held.nbytes < nbytes:
            memory = cuda.DeviceMemory(nbytes, lane.placement.device)
            held = self._resources.enter_context(memory)
            self._workspaces[lane] = held
        return held.pointer

    def close(self) -> None:
        """Free bindings, which hold their sessions, then those and the streams."""
        self._runs, self._opened = {}, {}
        super().close()


def _copies(
    stream: cuda.Stream,
    buffers: Sequence[cuda.Buffer],
    copy: Callable[[cuda.Buffer, cuda.Stream], None],
) -> cuda.Chain:
    """Copies between buffers and their pinned memory, captured."""
    for buffer in buffers:
        _ = buffer.staging  # allocated now: a capture forbids it

    def issue() -> None:
        for buffer in buffers:
            copy(buffer, stream)

    return cuda.Chain.capture(stream, issue)
