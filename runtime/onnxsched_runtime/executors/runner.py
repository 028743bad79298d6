"""What every way to run a plan on a GPU holds: streams, buffers, sessions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxsched_runtime import cuda
from onnxsched_runtime.arena import Arena, Touched, check_arena, plan_arena
from onnxsched_runtime.calling import called
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.fields import damaged
from onnxsched_runtime.fused import fused_nodes, weight_array
from onnxsched_runtime.moves import Cut, Joined, Place, check_places, places_inside
from onnxsched_runtime.moving import moved_nodes
from onnxsched_runtime.plan import ExecutionPlan, Piece
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import BufferView, SessionSettings
from onnxsched_runtime.source import ModelPart, ModelSource
from onnxsched_runtime.tensor import TensorType

WARM_UP_COUNT = 2
"""Runs before a capture: ORT settles its memory pattern in the second."""


class PlanRunner(ABC):
    """The streams, buffers and sessions of a plan on a GPU; what they run is up to its kinds."""

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        custom_ops: tuple[str, ...],
        graph_capture: bool = False,
    ) -> None:
        """Create streams, buffers and what runs on the host; sessions on the GPU come after.

        Args:
            source: The model that sessions are cut out of.
            plan: Says what runs where.
            custom_ops: Libraries of custom operators.
            graph_capture: Let ORT capture each session by itself.
        """
        self.plan = plan
        self._source = source
        self._resources = ExitStack()
        self._custom_ops, self._graph_capture = custom_ops, graph_capture
        self.streams: dict[Placement, cuda.Stream] = {}
        self.buffers: dict[str, cuda.Buffer] = {}
        self.sessions: dict[int, OrtSession] = {}
        """Of segments on the host, by their index."""
        self._fused, self._moves = fused_nodes(source), moved_nodes(source)
        self._weights: dict[tuple[Device, str], cuda.Buffer] = {}
        """What several sessions read, as it is stored."""
        self._fused_weights: dict[tuple[Device, str], cuda.Buffer] = {}
        """What fused convolutions read; filters lie channels last."""
        self._kernels: dict[int, cuda.FusedKernel | cuda.PlainPool] = {}
        """Of fused segments, by the index of the segment."""
        self._fused_workspaces: dict[Placement, cuda.DeviceMemory] = {}
        try:
            used = {piece.main for piece in plan.pieces}
            used |= {plan.placement_of(step) for piece in plan.pieces for step in piece.steps}
            self._open_streams(sorted(used))
            cuda.enable_peer_access(plan.devices)
            self._open_buffers()
            for index, segment in enumerate(plan.segments):
                if segment.host_reason is not None:
                    part = source.extract(segment)
                    self.sessions[index] = self._session(segment.placement, part)
            self._open_runs()
        except BaseException:
            self.close()
            raise

    def forget_weights(self) -> None:
        """Let go of the model, of which nothing is opened any more: weights are on the GPU."""
        self._source = replace(self._source, model=onnx.ModelProto())

    def _open_streams(self, placements: Sequence[Placement]) -> None:
        """A stream for each placement; the first of a device may be shared."""
        seen: set[Device] = set()
        for placement in placements:
            is_first = placement.device not in seen
            seen.add(placement.device)
            made = cuda.graph_stream if is_first else cuda.Stream
            self.streams[placement] = self._resources.enter_context(made(placement.device))

    def _open_buffers(self) -> None:
        """An arena on each device, and what lies in tensors in it."""
        tensors, touched = self._tensors(), self._touched()
        sizes = {name: self._kind(name).nbytes for name in sorted(tensors)}
        inside = {name: place for name, place in self._inside().items() if name in sizes}
        check_places(inside, sizes)
        for device in self.plan.devices:
            nbytes = {
                name: size
                for name, size in sizes.items()
                if tensors[name] == device and name not in inside
            }
            arena = plan_arena(self.plan, nbytes, touched, inside)
            check_arena(self.plan, nbytes, arena, touched, inside)
            self.buffers |= self._buffers_in(arena, device, self._resources)
        for name, place in inside.items():
            pointer = self.buffers[place.root].pointer + place.start_nbytes
            self.buffers[name] = cuda.Buffer(self._kind(name), tensors[name], pointer)
            self._resources.callback(self.buffers[name].close)

    def _inside(self) -> Mapping[str, Place]:
        """What lies in other tensors."""
        return places_inside(self.plan, self._moves, self._source.ends)

    @abstractmethod
    def _tensors(self) -> Mapping[str, Device]:
        """What needs a fixed address, and on which device."""

    def _touched(self) -> Touched:
        """What uses the places of tensors under other names."""
        return {}

    @abstractmethod
    def _open_runs(self) -> None:
        """Make the sessions that run on the GPU."""

    @abstractmethod
    def prepare(self, piece: Piece) -> None:
        """Make a piece ready to be captured or issued; pieces before it have been."""

    def _kind(self, tensor: str) -> TensorType:
        try:
            return self._source.tensors[self.plan.original(tensor)]
        except KeyError as error:
            raise damaged(f"{error} is missing") from error

    def _buffers_in(
        self, arena: Arena, device: Device, owner: ExitStack
    ) -> dict[str, cuda.Buffer]:
        """Memory for an arena, and a buffer for each tensor in it."""
        memory = owner.enter_context(cuda.DeviceMemory(arena.nbytes, device))
        buffers = {
            name: cuda.Buffer(self._kind(name), device, memory.pointer + offset)
            for name, offset in arena.offsets.items()
        }
        for buffer in buffers.values():
            owner.callback(buffer.close)
        return buffers

    def _session(
        self,
        placement: Placement,
        part: ModelPart,
        *,
        on_device: bool = False,
        keeps_nodes: bool = False,
    ) -> OrtSession:
        settings = SessionSettings(
            placement.device,
            stream_handle=self.streams[placement].handle if on_device else None,
            graph_capture=self._graph_capture and on_device,
            host_operators=not on_device,
            custom_ops=self._custom_ops,
            variant=self._source.variant,
            keeps_nodes=keeps_nodes,
        )
        session = OrtSession(part, settings)
        self._resources.callback(session.close)
        return session

    def _open_fused(self, indices: Sequence[int]) -> None:
        """Build the kernels of segments that no session runs, and upload their weights."""
        workspaces: dict[Placement, int] = {}
        for index in indices:
            segment = self.plan.segments[index]
            if segment.nodes[0] in self._moves:
                continue
            device, node = segment.placement.device, self._fused[segment.nodes[0]]
            wanted = self._source.kernels.get(node.what)
            kernel = called(device, cuda.fused_kernel, node.what, device, wanted)
            self._kernels[index] = kernel
            largest = max(workspaces.get(segment.placement, 0), kernel.workspace_nbytes)
            workspaces[segment.placement] = largest
            for name in filter(None, (node.filters, node.bias)):
                array = weight_array(self._source, name)
                self._upload(name, array, device, self._fused_weights)
        for placement, nbytes in workspaces.items():
            held = self._fused_workspaces.get(placement)
            if held is None or held.nbytes < nbytes:
                memory = cuda.DeviceMemory(nbytes, placement.device)
                self._fused_workspaces[placement] = self._resources.enter_context(memory)

    def _upload(
        self,
        name: str,
        array: np.ndarray,
        device: Device,
        held: dict[tuple[Device, str], cuda.Buffer],
    ) -> None:
        """Upload a weight once for all that read it on a device."""
        if (device, name) not in held:
            memory = self._resources.enter_context(cuda.DeviceMemory(array.nbytes, device))
            memory.upload(array, 0)
            kind = self._source.kind_of(name)
            held[device, name] = cuda.Buffer(kind, device, memory.pointer)

    def _fused_run(self, index: int, buffers: Mapping[str, cuda.Buffer]) -> FusedRun:
        """A fused segment on fixed buffers; those of one stream share a workspace."""
        segment = self.plan.segments[index]
        if segment.nodes[0] in self._moves:
            return FusedRun(self._moving(index, buffers), self.streams[segment.placement])
        node, placement = self._fused[segment.nodes[0]], segment.placement
        here = {self.plan.original(name): buffers[name].pointer for name in segment.inputs}
        weights = self._fused_weights
        places = cuda.Places(
            image=here[node.image],
            filters=weights[placement.device, node.filters].pointer if node.filters else None,
            output=buffers[segment.outputs[0]].pointer,
            bias=weights[placement.device, node.bias].pointer if node.bias else None,
            added=here[node.added] if node.added else None,
            workspace=self._fused_workspaces[placement].pointer,
        )
        return FusedRun(self._kernels[index].bind(places), self.streams[placement])

    def _moving(self, index: int, buffers: Mapping[str, cuda.Buffer]) -> cuda.Launch:
        """What moves numbers on fixed buffers, or leaves them where they are."""
        segment = self.plan.segments[index]
        device, move = segment.placement.device, self._moves[segment.nodes[0]]
        if isinstance(move, Joined):
            return _launch_nothing
        source, target = (buffers[t].pointer for t in (*segment.inputs, *segment.outputs))
        if not isinstance(move, Cut):
            return cuda.reordering(move, source, target, device)
        if source + move.start_nbytes == target:
            return _launch_nothing
        return cuda.cutting(move, source, target, device)

    def close(self) -> None:
        """Free the sessions, then the streams they launch on."""
        try:
            for device in dict.fromkeys(stream.device for stream in self.streams.values()):
                cuda.synchronize(device)
        finally:
            self.sessions, self.buffers = {}, {}
            self._resources.close()


@dataclass(frozen=True, slots=True)
class CopyRun:
    """A copy between devices."""

    source: cuda.Buffer
    target: cuda.Buffer
    stream: cuda.Stream

    def launch(self) -> None:
        """Start it."""
        self.target.fill_from(self.source, self.stream)


@dataclass(frozen=True, slots=True)
class FusedRun:
    """A kernel that no session runs, on fixed buffers."""

    start: cuda.Launch
    stream: cuda.Stream

    def launch(self) -> None:
        """Launch it."""
        called(self.stream.device, self.start, self.stream)


def _launch_nothing(_: cuda.Stream) -> None:
    """What lies in its place already needs no kernel."""


def view(buffer: cuda.Buffer) -> BufferView:
    """A buffer as a session sees it."""
    kind = buffer.kind
    return BufferView(buffer.pointer, buffer.device, kind.element_type, kind.shape or ())
