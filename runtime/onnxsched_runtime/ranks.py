"""A plan over several processes: what each of them runs, sends and receives. Pure.

A process is called by its rank. All of them derive all plans from the same schedule, so that
nothing needs to be agreed on. Tensors cross in one order, that of the launches of what writes
them, which every rank keeps to: hence none waits for another in a circle (see `rendezvous.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxsched_runtime.crossing import with_copies
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.partition import assemble
from onnxsched_runtime.plan import (
    ExecutionPlan,
    Operation,
    Receive,
    Run,
    Segment,
    Send,
    Step,
    check_plan,
)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor that goes from one rank to another."""

    tensor: str
    source: int
    target: int


def spread(devices: Sequence[Device], rank_count: int) -> dict[Device, int]:
    """Divide devices evenly, in order, among ranks.

    Raises:
        UsageError: There are more ranks than devices.
    """
    if rank_count > len(devices):
        used = ", ".join(map(str, devices))
        raise UsageError(
            f"The schedule uses {used}, too few for {rank_count} processes; start "
            f"{len(devices)} or fewer."
        )
    return {device: i * rank_count // len(devices) for i, device in enumerate(sorted(devices))}


def transfers(plan: ExecutionPlan, rank_of: Mapping[Device, int]) -> list[Transfer]:
    """What crosses between ranks, in the order in which it does."""
    return [item for item in _launches(plan, rank_of) if isinstance(item, Transfer)]


def split_plan(
    plan: ExecutionPlan, rank_of: Mapping[Device, int], rank_count: int
) -> tuple[ExecutionPlan, ...]:
    """The plan of each rank.

    Inputs are given to rank 0, and outputs are there in the end. A tensor is sent once to every
    rank that reads it, right after what writes it, on a stream that is for one peer; between
    devices of a rank it is copied. O(segments x streams + uses).

    Args:
        plan: A plan that passes `check_plan`.
        rank_of: The rank of each of its devices.
        rank_count: How many ranks there are.
    """
    launches = _launches(plan, rank_of)
    return tuple(_rank_plan(plan, launches, rank_of, rank) for rank in range(rank_count))


def on_device(plan: ExecutionPlan, device: Device) -> ExecutionPlan:
    """The plan of a rank that owns one device, under the name that this has on its machine."""

    def there(placement: Placement) -> Placement:
        return replace(placement, device=device)

    def moved(step: Step) -> Step:
        return step if isinstance(step, Run) else replace(step, placement=there(step.placement))

    segments = tuple(replace(s, placement=there(s.placement)) for s in plan.segments)
    pieces = tuple(
        replace(piece, main=there(piece.main), steps=tuple(map(moved, piece.steps)))
        for piece in plan.pieces
    )
    return replace(plan, segments=segments, pieces=pieces)


def _launches(plan: ExecutionPlan, rank_of: Mapping[Device, int]) -> list[int | Transfer]:
    """All segments but copies in launch order, each followed by the transfers of its outputs."""
    order = [i for piece in plan.pieces for i in piece.runs if not plan.is_copy(i)]
    holder = dict.fromkeys(plan.inputs, 0)
    readers: dict[str, set[int]] = {tensor: {0} for tensor in plan.outputs}
    for index in order:
        segment = plan.segments[index]
        rank = rank_of[segment.placement.device]
        holder |= dict.fromkeys(segment.outputs, rank)
        for tensor in _originals(plan, segment):
            readers.setdefault(tensor, set()).add(rank)

    def crossing(tensors: Iterable[str]) -> Iterator[Transfer]:
        for tensor in tensors:
            for rank in sorted(readers.get(tensor, set()) - {holder[tensor]}):
                yield Transfer(tensor, holder[tensor], rank)

    launches: list[int | Transfer] = list(crossing(plan.inputs))
    for index in order:
        launches += [index, *crossing(plan.segments[index].outputs)]
    return launches


def _originals(plan: ExecutionPlan, segment: Segment) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plan.original(tensor) for tensor in segment.inputs))


def _rank_plan(
    plan: ExecutionPlan,
    launches: Sequence[int | Transfer],
    rank_of: Mapping[Device, int],
    rank: int,
) -> ExecutionPlan:
    own = {
        f"segment {index}": plan.segments[index]
        for index in launches
        if isinstance(index, int) and rank_of[plan.segments[index].placement.device] == rank
    }
    first = min(d for d, r in rank_of.items() if r == rank)
    streams = _CommunicationStreams(plan, tuple(own.values()), first)
    crossing: dict[str, Send | Receive] = {}
    operations = []
    for item in launches:
        if isinstance(item, Transfer):
            if rank in (item.source, item.target):
                name = f"transfer {len(crossing)}"
                crossing[name] = step = streams.step(item, rank)
                operations.append(_as_operation(name, step))
        elif (name := f"segment {item}") in own:
            segment = own[name]
            reads = _originals(plan, segment)
            operations.append(
                Operation(
                    name,
                    segment.placement,
                    reads,
                    segment.outputs,
                    segment.host_reason,
                    segment.is_fused,
                )
            )
    ends = (plan.inputs, plan.outputs) if rank == 0 else ((), ())
    return _assembled(operations, crossing, own, ends)


class _CommunicationStreams:
    """On which streams a rank talks to others: one for each peer, where the tensor lies."""

    def __init__(self, plan: ExecutionPlan, own: Sequence[Segment], first: Device) -> None:
        self._first = first
        self._homes: dict[str, Device] = {}
        captured = [segment for segment in own if segment.host_reason is None]
        for segment in captured:
            self._homes |= dict.fromkeys(segment.outputs, segment.placement.device)
        for segment in captured:
            for tensor in _originals(plan, segment):
                self._homes.setdefault(tensor, segment.placement.device)
        self._stream_count = 1 + max((s.placement.stream for s in own), default=-1)

    def step(self, transfer: Transfer, rank: int) -> Send | Receive:
        home = self._homes.get(transfer.tensor, self._first)
        peer = transfer.target if rank == transfer.source else transfer.source
        placement = Placement(home, self._stream_count + peer)
        kind = Send if rank == transfer.source else Receive
        return kind(transfer.tensor, peer, placement)


def _as_operation(name: str, step: Send | Receive) -> Operation:
    if isinstance(step, Send):
        return Operation(name, step.placement, (step.tensor,), ())
    return Operation(name, step.placement, (), (step.tensor,))


def _assembled(
    operations: Sequence[Operation],
    crossing: Mapping[str, Send | Receive],
    own: Mapping[str, Segment],
    ends: tuple[tuple[str, ...], tuple[str, ...]],
) -> ExecutionPlan:
    """The checked plan of these operations, with steps and whole segments in their place."""
    moved, copies = with_copies(operations)
    units = [
        Segment((o.name,), o.placement, o.reads, o.writes, o.host_reason, o.is_fused)
        for o in moved
    ]
    plan = assemble(units, *ends, copies=copies)
    kept = [operation for operation in moved if operation.name not in crossing]
    number = {operation.name: i for i, operation in enumerate(kept)}

    def replaced(step: Step) -> Step:
        if not isinstance(step, Run):
            return step
        name = moved[step.segment].name
        return crossing[name] if name in crossing else Run(number[name])

    pieces = tuple(replace(p, steps=tuple(map(replaced, p.steps))) for p in plan.pieces)
    units = [unit for unit in units if unit.nodes[0] in number]
    plan = replace(plan, segments=tuple(units), pieces=pieces)
    check_plan(plan, kept)
    segments = [replace(u, nodes=own[u.nodes[0]].nodes) if u.nodes[0] in own else u for u in units]
    return replace(plan, segments=tuple(segments))
