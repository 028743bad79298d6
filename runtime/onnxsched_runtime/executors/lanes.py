"""A session for every stream of a piece, and one graph of what they launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

from onnxsched_runtime import cuda
from onnxsched_runtime.arena import ALIGNMENT_NBYTES, Touched, packed
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.runner import WARM_UP_COUNT, CopyRun, PlanRunner, view
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
from onnxsched_runtime.outliving import outliving, weights_to_place
from onnxsched_runtime.plan import ExecutionPlan, Piece
from onnxsched_runtime.settings import BufferView
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.wiring import Point, wire

_SCRATCH_NBYTES = 256 << 20
"""For warming up: to allocate for each lane alone takes longer than to run it."""


class LaneRunner(PlanRunner):
    """Captures each stream of a piece as one run of one session, and wires the runs together.

    Nothing runs at the same time until the graph does, so all sessions of a device launch on one
    stream. A session whose captured run needs it no longer is closed before the next is opened.
    """

    def __init__(
        self, source: ModelSource, plan: ExecutionPlan, custom_ops: tuple[str, ...] = ()
    ) -> None:
        """Create buffers and upload weights; nothing runs yet.

        Args:
            source: The model that sessions are cut out of, lowered where that can be.
            plan: Says which segments and on which streams.
            custom_ops: Libraries of custom operators.
        """
        self._chains: dict[Lane, cuda.Chain] = {}
        self._known: dict[tuple[int, ...], Lane] = {}
        """Each lane as it is run, by its segments."""
        self._marks: dict[Device, list[cuda.Buffer]] = {}
        self._shared: dict[Lane, tuple[str, ...]] = {}
        self._workspaces: dict[Lane, cuda.DeviceMemory] = {}
        super().__init__(source, plan, custom_ops)

    @cached_property
    def _lanes(self) -> dict[Piece, LanePlan]:
        return {p: self._planned(p) for p in self.plan.pieces if p.captured}

    def _planned(self, piece: Piece) -> LanePlan:
        """The lanes of a piece, those that can outlive their sessions prepared for it."""
        return lanes_of(self.plan, piece, self._known, self._finished)

    def _finished(self, lane: Lane) -> Lane:
        if self._is_copy(lane) or self._is_fused(lane):
            return lane
        return outliving(self._source, self.plan, lane)

    def _open_streams(self, placements: Sequence[Placement]) -> None:
        opened: dict[Device, cuda.Stream] = {}
        for placement in placements:
            if placement.device not in opened:
                stream = self._resources.enter_context(cuda.graph_stream(placement.device))
                opened[placement.device] = stream
            self.streams[placement] = opened[placement.device]

    @cached_property
    def _homes(self) -> dict[str, Device]:
        return lane_tensors(self.plan, self._all_lanes)

    def _tensors(self) -> dict[str, Device]:
        return self._homes

    def _touched(self) -> Touched:
        return touched_places(self._source, self.plan, self._session_lanes)

    @cached_property
    def _all_lanes(self) -> list[Lane]:
        return [lane for plan in self._lanes.values() for lane in plan.lanes]

    @cached_property
    def _session_lanes(self) -> list[Lane]:
        """What sessions run: neither copies nor fused nodes."""
        lanes = self._all_lanes
        return [lane for lane in lanes if not self._is_copy(lane) and not self._is_fused(lane)]

    def _open_runs(self) -> None:
        """Upload what sessions read from places of ours; they are opened one after another."""
        self._shared = shared_weights(self._source, self.plan, self._session_lanes)
        for lane in self._session_lanes:
            if lane.outlives:
                self._shared[lane] = weights_to_place(self._source, self.plan, lane)
            for name in self._shared[lane]:
                device = lane.placement.device
                self._upload(name, self._source.array(name), device, self._weights)
            self._open_marks(lane)

    def _is_copy(self, lane: Lane) -> bool:
        """Whether it is a copy, which has a stream of its own."""
        return self.plan.is_copy(lane.segments[0])

    def _is_fused(self, lane: Lane) -> bool:
        return self.plan.segments[lane.segments[0]].is_fused

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

    def prepare(self, piece: Piece) -> None:
        """Run each lane by itself, on memory that nothing shares, and capture it.

        What others compute is zero there, which is a valid index; in the arena it would be
        whatever lay there before. Lanes that have been captured before are left as they are.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        if piece.captured:
            self._prepare((self._lanes.get(piece) or self._planned(piece)).lanes)

    def _prepare(self, lanes: Sequence[Lane]) -> None:
        missing = [lane for lane in lanes if lane not in self._chains]
        self._open_fused([lane.segments[0] for lane in missing if self._is_fused(lane)])
        for batch in self._batches(missing):
            with ExitStack() as scratch:
                buffers = self._scratch(batch, scratch)
                for lane in batch:
                    if self._is_copy(lane):
                        self._capture_copy(lane, buffers)
                    elif self._is_fused(lane):
                        self._capture_fused(lane, buffers)
                    else:
                        self._capture_session(lane, buffers)

    def _batches(self, lanes: Sequence[Lane]) -> Iterator[list[Lane]]:
        """Lanes whose tensors lie beside each other for a while, not too many at a time."""
        batch: list[Lane] = []
        held = 0
        for lane in lanes:
            tensors = {*lane.inputs, *lane.outputs}
            nbytes = sum(self.buffers[name].kind.nbytes for name in tensors)
            if batch and held + nbytes > _SCRATCH_NBYTES:
                yield batch
                batch, held = [], 0
            batch.append(lane)
            held += nbytes
        if batch:
            yield batch

    def _scratch(self, lanes: Sequence[Lane], owner: ExitStack) -> dict[str, cuda.Buffer]:
        """A place of its own for each tensor of some lanes, aligned as where it will be.

        Libraries may choose kernels by that, and a capture can't load one that has not run.
        """
        wanted = {name for lane in lanes for name in (*lane.inputs, *lane.outputs)}
        past = {name: self.buffers[name].pointer % ALIGNMENT_NBYTES for name in wanted}
        buffers: dict[str, cuda.Buffer] = {}
        for device in self.plan.devices:
            places = packed({
                name: past[name] + self.buffers[name].kind.nbytes
                for name in wanted
                if self._homes[name] == device
            })  # fmt: skip
            offsets = {name: start + past[name] for name, start in places.offsets.items()}
            buffers |= self._buffers_in(replace(places, offsets=offsets), device, owner)
        return buffers

    def _capture_copy(self, lane: Lane, scratch: Mapping[str, cuda.Buffer]) -> None:
        def run(buffers: Mapping[str, cuda.Buffer]) -> CopyRun:
            source, target = (buffers[name] for name in (*lane.inputs, *lane.outputs))
            return CopyRun(source, target, self.streams[lane.placement])

        self._warm_up(lane, run(scratch).launch)
        self._capture_run(lane, run(self.buffers).launch)

    def _capture_fused(self, lane: Lane, scratch: Mapping[str, cuda.Buffer]) -> None:
        (index,) = lane.segments
        is_move = self.plan.segments[index].nodes[0] in self._moves
        # Which kernel moves numbers depends on where they lie, and none may be loaded later.
        self._warm_up(lane, self._fused_run(index, self.buffers if is_move else scratch).launch)
        self._capture_run(lane, self._fused_run(index, self.buffers).launch)

    def _capture_session(self, lane: Lane, scratch: Mapping[str, cuda.Buffer]) -> None:
        """Capture what a session runs; it is closed where the capture needs nothing of it."""
        session = self._session(
            lane.placement,
            marked_part(self._source, self.plan, lane, self._shared[lane]),
            on_device=True,
            keeps_nodes=self._source.is_lowered or bool(lane.marks),
        )
        self._warm_up(lane, session.bind(*self._views(lane, scratch)).launch)
        views = self._views(lane, self.buffers)
        chain = self._capture_run(lane, session.bind(*views).launch)
        places = [(v.pointer, v.nbytes) for group in views for v in group.values()]
        if lane.outlives and chain.reaches_only(places):
            session.close()

    def _views(
        self, lane: Lane, buffers: Mapping[str, cuda.Buffer]
    ) -> tuple[dict[str, BufferView], dict[str, BufferView]]:
        """What a lane's session reads and writes, by the names that it has there."""
        inputs = {self.plan.original(name): view(buffers[name]) for name in lane.inputs}
        device = lane.placement.device
        inputs |= {name: view(self._weights[device, name]) for name in self._shared[lane]}
        outputs = {self.plan.original(name): view(buffers[name]) for name in lane.outputs}
        for name, origin in written_instead(self._source, self.plan, lane).items():
            shape = self._source.tensors[origin].shape
            outputs[origin] = replace(outputs.pop(self.plan.original(name)), shape=shape or ())
        marks = self._marks[device]
        for number, mark in enumerate(lane.marks, 1):
            inputs[MARK_SOURCE] = view(marks[0])
            outputs[mark] = view(marks[number])
        return inputs, outputs

    def _warm_up(self, lane: Lane, launch: Callable[[], None]) -> None:
        for _ in range(WARM_UP_COUNT):
            launch()
        self.streams[lane.placement].synchronize()

    def _capture_run(self, lane: Lane, launch: Callable[[], None]) -> cuda.Chain:
        """Capture what a lane launches."""
        marks = self._marks.get(lane.placement.device, [])
        numbers = {marks[n].pointer: n for n in range(1, 1 + len(lane.marks))}
        chain = cuda.Chain.capture(self.streams[lane.placement], launch, numbers)
        self._chains[lane] = self._resources.enter_context(chain)
        return chain

    def capture(
        self, piece: Piece, uploads: Sequence[str] = (), fetches: Sequence[str] = ()
    ) -> cuda.Graph:
        """Put a piece together as one CUDA graph.

        Lanes that are not prepared yet are; putting them together in any order takes milliseconds.

        Args:
            piece: What the graph runs: a piece of the plan, or one of the same lanes that orders
                whatever that one orders.
            uploads: Tensors that it first copies from pinned memory.
            fetches: Tensors that it copies to pinned memory in the end.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        stream = self.streams[piece.main]
        plan = self._lanes.get(piece) or self._planned(piece)
        self._prepare(plan.lanes)
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
            chains = [self._chains[lane] for lane in plan.lanes]
            chains.append(owner.enter_context(_copies(stream, uploaded, cuda.Buffer.upload)))
            chains.append(owner.enter_context(_copies(stream, fetched, cuda.Buffer.fetch)))
            wired = wire([chain.nodes for chain in chains], positions, waits)
            workspaces = [
                self._workspace(lane, chain.workspace_nbytes)
                for lane, chain in zip(plan.lanes, chains, strict=False)
            ]
            return cuda.Graph.assemble(chains, wired, [*workspaces, 0, 0])

    def _workspace(self, lane: Lane, nbytes: int) -> int:
        """Memory for what a run allocates; runs of one lane never overlap."""
        held = self._workspaces.get(lane)
        if held is None:
            memory = cuda.DeviceMemory(nbytes, lane.placement.device)
            held = self._resources.enter_context(memory)
            self._workspaces[lane] = held
        return held.pointer


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
