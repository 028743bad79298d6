"""Annotated operations to plan, and slow ways to judge a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import networkx as nx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.partition import plan_execution
from onnxsched_runtime.plan import ExecutionPlan, Operation, Piece, Record, Run, Step, Wait


def stream(number: int, gpu: int = 0) -> Placement:
    """A stream of a GPU."""
    return Placement(Device("cuda", gpu), number)


def operation(
    name: str,
    on: int,
    reads: str = "",
    writes: str = "",
    *,
    host: str | None = None,
    fused: bool = False,
) -> Operation:
    """An operation on a stream; tensors are separated by spaces, and it writes its own name."""
    written = tuple((writes or name).split())
    return Operation(name, stream(on), tuple(reads.split()), written, host, fused)


@dataclass(frozen=True)
class Problem:
    """What `plan_execution` takes."""

    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ("x",)

    def plan(self) -> ExecutionPlan:
        """The plan of the code under test."""
        return plan_execution(self.operations, self.inputs, self.outputs)

    @property
    def links(self) -> set[tuple[str, str]]:
        """Pairs of operations, the second of which reads from the first."""
        writer = {t: o.name for o in self.operations for t in o.writes}
        return {(writer[t], o.name) for o in self.operations for t in o.reads if t in writer}


@st.composite
def problems(
    draw: DrawFn,
    max_operations: int = 10,
    *,
    hosts: bool = True,
    fuses: bool = True,
    streams: int = 4,
    gpus: int = 1,
) -> Problem:
    """Random operations in launch order: any graph, over streams, some fused or on the host."""
    reasons: SearchStrategy[str | None] = (
        st.sampled_from([None, None, None, "a loop", "a sequence"]) if hosts else st.none()
    )
    tensors = ["x"]
    operations = []
    for number in range(draw(st.integers(1, max_operations))):
        writes = [f"t{number}.{i}" for i in range(draw(st.sampled_from([1, 1, 2])))]
        reads = draw(st.lists(st.sampled_from(tensors), max_size=3, unique=True))
        placement = stream(draw(st.integers(0, streams - 1)), draw(st.integers(0, gpus - 1)))
        reason = draw(reasons)
        is_fused = fuses and reason is None and draw(st.sampled_from([False, False, True]))
        operations.append(
            Operation(f"o{number}", placement, tuple(reads), tuple(writes), reason, is_fused)
        )
        tensors += writes
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=3, unique=True))
    return Problem(tuple(operations), tuple(outputs))


def closure(edges: Iterable[tuple[Any, Any]]) -> set[tuple[Any, Any]]:
    """All pairs joined by a path."""
    return set(nx.transitive_closure_dag(nx.DiGraph(edges)).edges)


def happens_before(plan: ExecutionPlan) -> set[tuple[Any, Any]]:
    """What a plan orders: pairs of segments, and of a piece's `(number, "start" or "end")`.

    A piece is all that is between its start and its end on the main stream; pieces follow one
    another, a stream runs its steps in turn, and a wait follows its record.
    """
    edges: list[tuple[Any, Any]] = []
    for number, piece in enumerate(plan.pieces):
        start, end = (number, "start"), (number, "end")
        lanes: dict[Placement, list[Any]] = {piece.main: [start]}
        records: dict[int, Any] = {}
        for position, step in enumerate(piece.steps):
            vertex = step.segment if isinstance(step, Run) else (number, position)
            lanes.setdefault(plan.placement_of(step), []).append(vertex)
            if isinstance(step, Record):
                records[step.event] = vertex
            elif isinstance(step, Wait):
                edges.append((records[step.event], vertex))
        lanes[piece.main].append(end)
        edges += [pair for lane in lanes.values() for pair in pairwise(lane)]
        edges.append((end, (number + 1, "start")))
    return closure(edges)


def interleaved(plan: ExecutionPlan, generator: Random) -> Iterator[tuple[bool, int]]:
    """Whether a segment begins, else ends, and which: streams go on at random, runs take time."""
    for piece in plan.pieces:
        queues: dict[Placement, deque[Step]] = {}
        for step in piece.steps:
            queues.setdefault(plan.placement_of(step), deque()).append(step)
        recorded: set[int] = set()
        running: set[Placement] = set()
        while any(queues.values()):
            able = [
                placement
                for placement, queue in queues.items()
                if queue and not (isinstance(queue[0], Wait) and queue[0].event not in recorded)
            ]
            placement = generator.choice(able)
            step = queues[placement][0]
            if isinstance(step, Run) and placement not in running:
                running.add(placement)
                yield True, step.segment
                continue
            queues[placement].popleft()
            if isinstance(step, Run):
                running.remove(placement)
                yield False, step.segment
            elif isinstance(step, Record):
                recorded.add(step.event)


def is_right(plan: ExecutionPlan) -> bool:
    """Whether the steps of a plan order everything that they must, found by brute force."""
    for piece in plan.pieces:
        records: list[int] = []
        for step in piece.steps:
            if isinstance(step, Record):
                records.append(step.event)
            elif isinstance(step, Wait) and step.event not in records:
                return False
        if len(set(records)) < len(records):
            return False
    order = happens_before(plan)
    work = [
        (number, step.segment if isinstance(step, Run) else (number, position), step)
        for number, piece in enumerate(plan.pieces)
        for position, step in enumerate(piece.steps)
        if not isinstance(step, Record | Wait)
    ]
    writer = {tensor: vertex for _, vertex, step in work for tensor in plan.writes(step)}
    needed: list[tuple[Any, Any]] = [
        pair
        for number, vertex, _ in work
        for pair in (((number, "start"), vertex), (vertex, (number, "end")))
    ]
    needed += [
        (writer[t], vertex) for _, vertex, step in work for t in plan.reads(step) if t in writer
    ]
    return order.issuperset(needed)


def with_steps(plan: ExecutionPlan, number: int, steps: Sequence[Step]) -> ExecutionPlan:
    """The plan with other steps in one piece."""
    pieces = list(plan.pieces)
    pieces[number] = replace(pieces[number], steps=tuple(steps))
    return replace(plan, pieces=tuple(pieces))


def positions(plan: ExecutionPlan, kind: type[Step]) -> list[tuple[int, int]]:
    """Where the steps of a kind are: pairs of a piece and a position in it."""
    return [
        (number, position)
        for number, piece in enumerate(plan.pieces)
        for position, step in enumerate(piece.steps)
        if isinstance(step, kind)
    ]


def without_step(plan: ExecutionPlan, number: int, position: int) -> ExecutionPlan:
    """The plan with one step left out."""
    steps = plan.pieces[number].steps
    return with_steps(plan, number, steps[:position] + steps[position + 1 :])


def with_step_moved(plan: ExecutionPlan, number: int, position: int, target: int) -> ExecutionPlan:
    """The plan with one step issued at another position of its piece."""
    steps = list(plan.pieces[number].steps)
    steps.insert(target, steps.pop(position))
    return with_steps(plan, number, steps)


@st.composite
def damaged(draw: DrawFn, plan: ExecutionPlan) -> ExecutionPlan:
    """The plan with an event less, a step elsewhere, or two pieces exchanged."""
    kind = draw(st.sampled_from(["drop", "move", "exchange"]))
    if kind == "exchange":
        pieces: list[Piece] = draw(st.permutations(plan.pieces))
        return replace(plan, pieces=tuple(pieces))
    number = draw(st.integers(0, len(plan.pieces) - 1))
    steps = plan.pieces[number].steps
    position = draw(st.integers(0, len(steps) - 1))
    if kind == "drop" and not isinstance(steps[position], Run):
        return without_step(plan, number, position)
    return with_step_moved(plan, number, position, draw(st.integers(0, len(steps) - 1)))


@st.composite
def topological_orders(draw: DrawFn, needs: Sequence[Iterable[int]]) -> list[int]:
    """Orders in which every unit comes after those it needs."""
    priority = draw(st.permutations(range(len(needs))))
    order: list[int] = []
    while len(order) < len(needs):
        ready = (
            unit
            for unit in range(len(needs))
            if unit not in order and set(needs[unit]) <= set(order)
        )
        order.append(min(ready, key=priority.__getitem__))
    return order
