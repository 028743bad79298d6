"""The execution plan: segments, and the steps that run them in the right order.

A plan is a list of pieces that run one after another. The steps of a captured piece run on the
streams of their placements, ordered by events; a host piece runs one segment while the
device waits. Positions in `Piece.steps` are the order in which the host issues them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from onnxsched_runtime.clocks import Clocks
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import PlanError


@dataclass(frozen=True, slots=True)
class Operation:
    """A node of an annotated model, as planning sees it."""

    name: str
    placement: Placement
    reads: tuple[str, ...]
    """Tensors it needs that are not weights, those its subgraphs capture included."""
    writes: tuple[str, ...]
    host_reason: str | None = None
    """Why it can't be captured into a CUDA graph; None where it can."""
    is_fused: bool = False
    """Whether no session runs it: a convolution through cuDNN, say."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations of one stream that run back to back as one ORT session, or a fused one."""

    nodes: tuple[str, ...]
    """Node names in launch order."""
    placement: Placement
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """What others read: later segments, or the caller."""
    host_reason: str | None = None
    is_fused: bool = False
    """Whether it is one operation that no session runs."""


@dataclass(frozen=True, slots=True)
class Run:
    """Launch a segment on its own stream."""

    segment: int
    """Index into `ExecutionPlan.segments`."""


@dataclass(frozen=True, slots=True)
class Record:
    """Record an event on a stream, after all that was issued there."""

    event: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Wait:
    """Make a stream wait for an event."""

    event: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Send:
    """Send a tensor to another process, after all that was issued on the stream."""

    tensor: str
    rank: int
    """Who receives it."""
    placement: Placement


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive a tensor from another process; the stream goes on once it is there."""

    tensor: str
    rank: int
    """Who sends it."""
    placement: Placement


Step = Run | Record | Wait | Send | Receive


@dataclass(frozen=True, slots=True)
class Piece:
    """Steps that become one CUDA graph, or one segment that stays on the host."""

    captured: bool
    main: Placement
    """The stream that a captured piece forks from and joins to."""
    steps: tuple[Step, ...]

    @property
    def runs(self) -> tuple[int, ...]:
        """The segments of this piece in launch order."""
        return tuple(step.segment for step in self.steps if isinstance(step, Run))


def name_on(tensor: str, device: Device) -> str:
    """What the copy of a tensor on a device is called."""
    return f"{tensor}@{device}"


@dataclass(frozen=True)
class ExecutionPlan:
    """Segments and the pieces that run them."""

    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    """Model inputs."""
    outputs: tuple[str, ...]
    """Model outputs."""
    copies: Mapping[str, str] = field(default_factory=dict, hash=False)
    """For each tensor that is called otherwise than in the model, what it is called there: for
    copies on other devices, say."""

    def original(self, tensor: str) -> str:
        """The tensor of the model that a tensor of the plan holds."""
        return self.copies.get(tensor, tensor)

    def named(self, tensor: str, device: Device) -> str:
        """What a tensor of the model is called that an operator on a device writes."""
        name = name_on(tensor, device)
        return name if name in self.copies else tensor

    def is_copy(self, segment: int) -> bool:
        """Whether a segment only copies a tensor to its device: it is called as what it writes."""
        found = self.segments[segment]
        return found.nodes[0] in self.copies and found.outputs == found.nodes

    def placement_of(self, step: Step) -> Placement:
        """The stream that a step is issued on."""
        return self.segments[step.segment].placement if isinstance(step, Run) else step.placement

    def reads(self, step: Step) -> tuple[str, ...]:
        """The tensors that must be there before a step."""
        if isinstance(step, Run):
            return self.segments[step.segment].inputs
        return (step.tensor,) if isinstance(step, Send) else ()

    def writes(self, step: Step) -> tuple[str, ...]:
        """The tensors that are there after a step."""
        if isinstance(step, Run):
            return self.segments[step.segment].outputs
        return (step.tensor,) if isinstance(step, Receive) else ()

    @property
    def _captured_steps(self) -> tuple[Step, ...]:
        return tuple(step for piece in self.pieces if piece.captured for step in piece.steps)

    @cached_property
    def readers(self) -> dict[str, frozenset[int]]:
        """The segments that read each tensor, by index."""
        found: dict[str, set[int]] = {}
        for index, segment in enumerate(self.segments):
            for tensor in segment.inputs:
                found.setdefault(tensor, set()).add(index)
        return {tensor: frozenset(indices) for tensor, indices in found.items()}

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """All devices it uses, in order."""
        steps = (step for piece in self.pieces for step in piece.steps)
        return tuple(sorted({self.placement_of(step).device for step in steps}))

    @cached_property
    def device_of(self) -> Mapping[str, Device]:
        """Where each device tensor lies: where it is written, else where it is first read."""
        found: dict[str, Device] = {}
        for step in self._captured_steps:
            found |= dict.fromkeys(self.writes(step), self.placement_of(step).device)
        for step in self._captured_steps:
            if not (isinstance(step, Run) and self.is_copy(step.segment)):
                for tensor in self.reads(step):
                    found.setdefault(tensor, self.placement_of(step).device)
        return found

    @property
    def wait_count(self) -> int:
        """How many event waits the captured pieces hold."""
        return sum(isinstance(step, Wait) for piece in self.pieces for step in piece.steps)

    @cached_property
    def device_tensors(self) -> frozenset[str]:
        """Tensors that captured pieces read or write, which therefore need fixed addresses."""
        steps = self._captured_steps
        return frozenset(t for s in steps for t in (*self.reads(s), *self.writes(s)))


def check_plan(plan: ExecutionPlan, operations: Iterable[Operation]) -> None:
    """Check that a plan computes the model in every interleaving its events allow.

    The laws: every operation is in one segment, a fused one alone, and every segment runs once,
    on the stream it is placed on; a tensor has one writer, and whoever reads it runs after that
    writer by the happens-before relation of streams and events; a captured piece starts after its
    fork and is finished when its main stream is; no event is waited for before it is recorded; a
    segment reads from its own device, but for copies, which read from another. Receiving writes
    a tensor, and sending reads one; whether other processes fit is up to `check_ranks`.
    O(steps x streams).

    Raises:
        PlanError: names the first segment, event or tensor that breaks a law.
    """
    _check_cover(plan, tuple(operations))
    _check_devices(plan)
    written: set[str] = set(plan.inputs)
    for number, piece in enumerate(plan.pieces):
        if piece.captured:
            _check_piece(plan, piece, number, frozenset(written))
        for step in piece.steps:
            if not piece.captured:
                _require_written(plan, step, written)
            if repeated := written.intersection(plan.writes(step)):
                raise PlanError(f"Tensor '{min(repeated)}' is written twice.")
            written.update(plan.writes(step))
    if missing := set(plan.outputs) - written:
        raise PlanError(f"Model output '{min(missing)}' is written by no segment.")


def _check_cover(plan: ExecutionPlan, operations: tuple[Operation, ...]) -> None:
    held = Counter(name for segment in plan.segments for name in segment.nodes)
    expected = Counter(operation.name for operation in operations)
    if wrong := (held - expected) | (expected - held):
        raise PlanError(f"Operation '{min(wrong)}' is not in exactly one segment.")
    by_name = {operation.name: operation for operation in operations}
    for segment in plan.segments:
        visible = set(segment.inputs)
        for operation in (by_name[name] for name in segment.nodes):
            if operation.is_fused != segment.is_fused or (segment.is_fused and segment.nodes[1:]):
                raise PlanError(f"Operation '{operation.name}' is in a segment of another kind.")
            if operation.placement != segment.placement and segment.host_reason is None:
                raise PlanError(f"Operation '{operation.name}' runs on {segment.placement}.")
            if lost := set(operation.reads) - visible:
                raise PlanError(f"Operation '{operation.name}' can't see tensor '{min(lost)}'.")
            visible.update(operation.writes)
    runs = Counter(index for piece in plan.pieces for index in piece.runs)
    expected_runs = Counter(range(len(plan.segments)))
    if wrong_runs := (runs - expected_runs) | (expected_runs - runs):
        raise PlanError(f"Segment number {min(wrong_runs)} is not run exactly once.")


def _check_devices(plan: ExecutionPlan) -> None:
    for step in (step for piece in plan.pieces if piece.captured for step in piece.steps):
        device = plan.placement_of(step).device
        for tensor in plan.reads(step):
            home = plan.device_of.get(tensor)
            if isinstance(step, Run) and plan.is_copy(step.segment):
                (copy,) = plan.writes(step)
                if home in (device, None) or plan.original(copy) != plan.original(tensor):
                    raise PlanError(f"Copying '{tensor}' from {home} to {device} makes no sense.")
            elif home != device:
                raise PlanError(f"{_name(plan, step)} on {device} reads '{tensor}' on {home}.")


def _require_written(plan: ExecutionPlan, step: Step, written: set[str]) -> None:
    if missing := set(plan.reads(step)) - written:
        raise PlanError(f"{_name(plan, step)} reads '{min(missing)}' before it is written.")


def _name(plan: ExecutionPlan, step: Step) -> str:
    return f"Segment {plan.segments[step.segment].nodes}" if isinstance(step, Run) else str(step)


def _check_piece(plan: ExecutionPlan, piece: Piece, number: int, earlier: frozenset[str]) -> None:
    clocks = Clocks({piece.main: {piece.main: 1}})  # the fork is the main stream's first tick
    writer: dict[str, tuple[Placement, int]] = {}
    for step in piece.steps:
        if isinstance(step, Record):
            clocks.record(step.event, step.placement)
            continue
        if isinstance(step, Wait):
            clocks.wait(step.event, step.placement)
            continue
        placement, name = plan.placement_of(step), _name(plan, step)
        clock = clocks.of(placement)
        if isinstance(step, Run) and plan.segments[step.segment].host_reason is not None:
            raise PlanError(f"{name} in captured piece {number} can't be.")
        if clock.get(piece.main, 0) < 1:
            raise PlanError(f"{name} may run before piece {number} starts.")
        for tensor in plan.reads(step):
            stream, tick = writer.get(tensor, (piece.main, 1 if tensor in earlier else 2**62))
            if clock.get(stream, 0) < tick:
                raise PlanError(f"{name} may read '{tensor}' too early.")
        tick = clocks.run(placement)
        writer.update(dict.fromkeys(plan.writes(step), (placement, tick)))
    known = clocks.of(piece.main)
    for placement, clock in clocks.streams.items():
        if known.get(placement, 0) < clock.get(placement, 0):
            raise PlanError(f"Piece {number} may end before stream {placement} does.")
