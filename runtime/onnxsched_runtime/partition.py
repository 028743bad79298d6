"""From annotated operations to segments and an execution plan. Pure.

Which waits are needed follows from the happens-before relation alone: an event is waited for
only if stream order and the waits already made do not imply it. Segments are then cut exactly
where an event is needed, so that they are as few as the schedule allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from onnxsched_runtime.crossing import with_copies
from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.plan import (
    ExecutionPlan,
    Operation,
    Piece,
    Record,
    Run,
    Segment,
    Step,
    Wait,
    check_plan,
)

_START = -1
"""The unit that stands for the start of a piece on its main stream."""


@dataclass(frozen=True, slots=True)
class RequiredWaits:
    """The event waits that stream order does not already give."""

    before: tuple[tuple[int, ...], ...]
    """For each unit the units it must wait for; -1 is the start of the piece."""
    at_end: tuple[int, ...]
    """The units that the main stream must wait for at the end."""


def required_waits(
    placements: Sequence[Placement], dependencies: Sequence[Sequence[int]], main: Placement
) -> RequiredWaits:
    """Find the fewest waits that order every dependency, given the launch order.

    Units (operations or segments) are numbered in launch order; a unit depends on earlier ones
    only. Each stream keeps a vector clock of the last unit of every other stream known to be
    finished. O((units + dependencies) x streams).

    Args:
        placements: The stream of each unit.
        dependencies: For each unit the units whose results it needs.
        main: The stream that everything forks from and joins to.
    """
    numbers: dict[Placement, int] = {main: 0}  # of streams: dictionaries find them sooner
    streams = [numbers.setdefault(placement, len(numbers)) for placement in placements]
    clocks: dict[int, dict[int, int]] = {0: {0: _START}}
    done: dict[int, dict[int, int]] = {_START: {0: _START}}
    stream_of = {_START: 0, **dict(enumerate(streams))}

    def unknown(units: Iterable[int], clock: dict[int, int]) -> tuple[int, ...]:
        latest: dict[int, int] = {}
        for unit in sorted(units):
            if clock.get(stream_of[unit], -2) < unit:
                latest[stream_of[unit]] = unit
        return tuple(
            unit
            for stream, unit in latest.items()
            if not any(done[o].get(stream, -2) >= unit for o in latest.values() if o != unit)
        )

    def learn(clock: dict[int, int], waits: Iterable[int]) -> None:
        for unit in waits:
            for stream, last in done[unit].items():
                clock[stream] = max(clock.get(stream, -2), last)

    before = []
    for unit, stream in enumerate(streams):
        clock = clocks.setdefault(stream, {})
        waits = unknown((_START, *dependencies[unit]), clock)
        learn(clock, waits)
        before.append(waits)
        clock[stream] = unit
        done[unit] = dict(clock)
    ends = {stream: unit for unit, stream in enumerate(streams)}
    return RequiredWaits(tuple(before), unknown(ends.values(), clocks[0]))


def plan_execution(
    operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]
) -> ExecutionPlan:
    """Cut operations in launch order into segments and order them by events.

    Operations that can't be captured stay together: everything is grouped into levels that
    alternate between captured and host pieces, each level holding all that is ready by then.
    Tensors that are read on another device are copied there.

    Args:
        operations: The operations of the model in launch order.
        inputs: The model's inputs.
        outputs: The model's outputs.

    Raises:
        PlanError: The launch order runs an operation before one it reads from.
    """
    operations, copies = with_copies(operations)
    units: list[Segment] = []
    kept = readers_of(operations, outputs)
    by_level: dict[int, list[Operation]] = {}
    for operation, level in zip(operations, capture_levels(operations), strict=True):
        by_level.setdefault(level, []).append(operation)
    for level in sorted(by_level):
        units += _cut(by_level[level], kept, host=level % 2 == 1)
    plan = assemble(units, inputs, outputs, copies=copies)
    check_plan(plan, operations)
    return plan


def capture_levels(operations: Sequence[Operation]) -> list[int]:
    """The piece each operation belongs to: even for captured, odd for host pieces.

    Raises:
        PlanError: The launch order runs an operation before one it reads from.
    """
    level_of: dict[str, int] = {}
    later = {tensor for operation in operations for tensor in operation.writes}
    levels = []
    for operation in operations:
        if early := [t for t in operation.reads if t in later and t not in level_of]:
            raise PlanError(f"Operation '{operation.name}' is launched before '{early[0]}' is.")
        level = max((level_of.get(tensor, 0) for tensor in operation.reads), default=0)
        level += level % 2 != (operation.host_reason is not None)
        level_of.update(dict.fromkeys(operation.writes, level))
        levels.append(level)
    return levels


def assemble(
    segments: Sequence[Segment],
    inputs: Sequence[str],
    outputs: Sequence[str],
    launch_order: Sequence[int] | None = None,
    streams: Mapping[int, Placement] | None = None,
    copies: Mapping[str, str] | None = None,
) -> ExecutionPlan:
    """Order segments by events; neighbours that can be captured share a piece.

    Args:
        segments: The segments.
        inputs: The model's inputs.
        outputs: The model's outputs.
        launch_order: Indices of the segments to launch, in this order; all as given if None.
        streams: For segments that keep the order of another stream than their own, that one.
        copies: From `with_copies`.
    """
    order = list(range(len(segments)) if launch_order is None else launch_order)
    writer = {tensor: i for i in order for tensor in segments[i].outputs}
    needs = {i: {writer[t] for t in segments[i].inputs if t in writer} for i in order}
    pieces = []
    for host, run in groupby(order, lambda i: segments[i].host_reason is not None):
        indices = list(run)
        if host:
            pieces += [Piece(False, segments[i].placement, (Run(i),)) for i in indices]
        else:
            pieces.append(_captured_piece(segments, indices, needs, streams or {}))
    return ExecutionPlan(
        tuple(segments), tuple(pieces), tuple(inputs), tuple(outputs), copies or {}
    )


def _captured_piece(
    segments: Sequence[Segment],
    indices: Sequence[int],
    needs: Mapping[int, set[int]],
    streams: Mapping[int, Placement],
) -> Piece:
    unit_of = {index: unit for unit, index in enumerate(indices)}
    placements = [segments[i].placement for i in indices]
    ordered = [streams.get(i, segments[i].placement) for i in indices]
    local = [[unit_of[n] for n in needs[i] if n in unit_of] for i in indices]
    waits = _between(placements, required_waits(ordered, local, min(ordered)), ordered)
    main = min(placements)
    awaited = {u for units in (*waits.before, waits.at_end) for u in units}
    event = {unit: number for number, unit in enumerate(sorted(awaited))}
    steps: list[Step] = [Record(event[_START], main)] if _START in awaited else []
    for unit, index in enumerate(indices):
        steps += [Wait(event[u], placements[unit]) for u in waits.before[unit]]
        steps.append(Run(index))
        if unit in awaited:
            steps.append(Record(event[unit], placements[unit]))
    steps += [Wait(event[u], main) for u in waits.at_end]
    return Piece(True, main, tuple(steps))


def _between(
    placements: Sequence[Placement], waits: RequiredWaits, ordered: Sequence[Placement]
) -> RequiredWaits:
    """The waits with those between neighbours of a stream that are on streams of their own."""
    main = min(placements)
    last: dict[Placement, int] = {}
    before = []
    for unit, (placement, stream) in enumerate(zip(placements, ordered, strict=True)):
        earlier = last.get(stream)
        own = waits.before[unit]
        if earlier is not None and placements[earlier] != placement:
            own = (*own, earlier)
        elif earlier is None and not own and placement != main:
            own = (_START,)
        before.append(own)
        last[stream] = unit
    end = last[min(ordered)]
    is_known = placements[end] == main or end in waits.at_end
    return RequiredWaits(tuple(before), waits.at_end if is_known else (*waits.at_end, end))


def readers_of(
    operations: Sequence[Operation], outputs: Sequence[str]
) -> dict[str, set[str | None]]:
    """For each tensor who reads it: operation names, None for the caller."""
    readers: dict[str, set[str | None]] = {}
    for operation in operations:
        for tensor in operation.reads:
            readers.setdefault(tensor, set()).add(operation.name)
    for tensor in outputs:
        readers.setdefault(tensor, set()).add(None)
    return readers


def _cut(
    operations: Sequence[Operation], readers: dict[str, set[str | None]], host: bool
) -> list[Segment]:
    """Cut one level into segments, in the launch order of their first operations."""
    if host:
        return [segment_of(operations, readers)]
    writer = {tensor: i for i, op in enumerate(operations) for tensor in op.writes}
    needs = [[writer[t] for t in op.reads if t in writer] for op in operations]
    placements = [operation.placement for operation in operations]
    waits = required_waits(placements, needs, min(placements))
    awaited = {unit for units in waits.before for unit in units}
    runs: list[list[Operation]] = []
    open_run: dict[Placement, list[Operation]] = {}
    for unit, operation in enumerate(operations):
        run = open_run.get(operation.placement)
        if run is None or waits.before[unit] or operation.is_fused:
            run = open_run[operation.placement] = []
            runs.append(run)
        run.append(operation)
        if unit in awaited or operation.is_fused:
            del open_run[operation.placement]
    return [segment_of(run, readers) for run in runs]


def segment_of(operations: Sequence[Operation], readers: dict[str, set[str | None]]) -> Segment:
    """The segment that holds these operations, placed where the first one is.

    Args:
        operations: In launch order.
        readers: From `readers_of` all operations of the model.
    """
    names = tuple(operation.name for operation in operations)
    own: set[str | None] = set(names)
    inner = {tensor for operation in operations for tensor in operation.writes}
    reads = dict.fromkeys(t for o in operations for t in o.reads if t not in inner)
    written = dict.fromkeys(t for operation in operations for t in operation.writes)
    outputs = tuple(t for t in written if not readers.get(t, set()) <= own)
    reasons = dict.fromkeys(o.host_reason for o in operations if o.host_reason)
    placement = operations[0].placement
    if not outputs:  # of use to nobody, but ORT runs no model without an output
        outputs = tuple(written)[-1:]
    reason, is_fused = "; ".join(reasons) or None, operations[0].is_fused
    return Segment(names, placement, tuple(reads), outputs, reason, is_fused)


def segments_of_run(
    operations: Sequence[Operation], readers: dict[str, set[str | None]]
) -> list[Segment]:
    """The segments of operations that follow each other on one stream: a fused one is alone."""
    runs: list[list[Operation]] = []
    for operation in operations:
        if not runs or operation.is_fused or runs[-1][-1].is_fused:
            runs.append([])
        runs[-1].append(operation)
    return [segment_of(run, readers) for run in runs]
