"""What lies in another tensor is right whenever it is read, in any interleaving of the streams."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn

from onnxsched_runtime.arena import ALIGNMENT_NBYTES, Arena, check_arena, plan_arena
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.moves import (
    FINEST_NBYTES,
    Cut,
    Joined,
    Move,
    Place,
    check_places,
    left_in_place,
    places_inside,
)
from onnxsched_runtime.plan import ExecutionPlan, Operation
from support.plans import Problem, interleaved, operation, stream


@dataclass(frozen=True)
class Moved:
    """A plan some of whose operations move numbers, and what each tensor of the model holds."""

    plan: ExecutionPlan
    moves: Mapping[str, Move]
    content: Mapping[str, np.ndarray]
    """For each byte the number of the tensor that it was computed for."""
    ends: frozenset[str]
    """Inputs and outputs."""

    @property
    def inside(self) -> dict[str, Place]:
        return places_inside(self.plan, self.moves, self.ends)

    def nbytes(self, name: str) -> int:
        return len(self.content[self.plan.original(name)])

    def arenas(self) -> dict[Device, Arena]:
        """An arena for each device, checked."""
        plan, inside = self.plan, self.inside
        check_places(inside, {name: self.nbytes(name) for name in plan.device_tensors})
        arenas = {}
        for device in plan.devices:
            nbytes = {
                name: self.nbytes(name)
                for name, home in plan.device_of.items()
                if home == device and name not in inside
            }
            arenas[device] = plan_arena(plan, nbytes, inside=inside)
            check_arena(plan, nbytes, arenas[device], inside=inside)
        return arenas


@st.composite
def moved_plans(draw: DrawFn, gpus: int = 2) -> Moved:
    """Random plans of operations that compute, cut and join."""
    moves: dict[str, Move] = {}
    content = {"x": np.zeros(64, np.int32)}
    joined: set[str] = set()
    operations = []
    gpu_count = draw(st.integers(1, gpus))
    for number in range(draw(st.sampled_from([4, 8, 12, 12]))):
        name = f"t{number}"
        placement = stream(draw(st.integers(0, 2)), draw(st.integers(0, gpu_count - 1)))
        tensors = st.sampled_from([*content, *[*content][-3:]])
        kind = draw(st.sampled_from(["compute", "compute", "cut", "join", "join"]))
        parts = [t for t in content if t not in joined and t != "x"]
        if kind == "join" and parts:
            reads = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3, unique=True))
            joined.update(reads)
            starts = accumulate((len(content[part]) for part in reads[:-1]), initial=0)
            moves[name] = Joined(tuple(reads), name, tuple(starts))
            content[name] = np.concatenate([content[part] for part in reads])
        elif kind == "cut":
            reads = [draw(tensors)]
            whole = content[reads[0]]
            start = min(draw(st.sampled_from([0, 8, 16, 16])), len(whole))
            size = min(draw(st.sampled_from([0, 16, 32, 256])), len(whole) - start)
            size -= size % FINEST_NBYTES
            content[name] = whole[start : start + size]
            moves[name] = Cut(reads[0], name, start, size, len(whole))
        else:
            reads = draw(st.lists(tensors, max_size=2, unique=True))
            content[name] = np.full(draw(st.sampled_from([0, 16, 256, 272])), number, np.int32)
        is_fused = name in moves or draw(st.booleans())
        operations.append(Operation(name, placement, tuple(reads), (name,), None, is_fused))
    free = [o.name for o in operations if o.name not in joined]
    outputs = draw(st.lists(st.sampled_from(free), min_size=1, max_size=2, unique=True))
    plan = Problem(tuple(operations), tuple(outputs)).plan()
    return Moved(plan, moves, content, frozenset({"x", *outputs}))


class Memory:
    """The bytes of every device, and what runs leave in them."""

    def __init__(self, moved: Moved) -> None:
        self._moved, self._inside = moved, moved.inside
        self._arenas = moved.arenas()
        self._bytes = {
            device: np.full(arena.nbytes, -1, np.int32) for device, arena in self._arenas.items()
        }

    def address(self, name: str) -> tuple[Device, int]:
        device = self._moved.plan.device_of[name]
        place = self._inside.get(name, Place(name, 0))
        return device, self._arenas[device].offsets[place.root] + place.start_nbytes

    def _at(self, name: str) -> np.ndarray:
        device, start = self.address(name)
        return self._bytes[device][start : start + self._moved.nbytes(name)]

    def write(self, name: str) -> None:
        self._at(name)[:] = self._moved.content[self._moved.plan.original(name)]

    def require(self, name: str) -> None:
        expected = self._moved.content[self._moved.plan.original(name)]
        np.testing.assert_array_equal(self._at(name), expected, name)

    def begin(self, index: int) -> None:
        """The earliest write of a run."""
        segment = self._moved.plan.segments[index]
        move = self._moved.moves.get(segment.nodes[0])
        if isinstance(move, Cut):
            (device, start), there = map(self.address, (segment.inputs[0], segment.outputs[0]))
            if (device, start + move.start_nbytes) == there:
                return
        for name in () if isinstance(move, Joined) else segment.outputs:
            if name in self._moved.plan.device_tensors:
                self.write(name)

    def end(self, index: int) -> None:
        """Its latest read."""
        segment = self._moved.plan.segments[index]
        for name in (*segment.inputs, *segment.outputs):
            if name in self._moved.plan.device_tensors:
                self.require(name)


@settings(deadline=None, max_examples=300)
@given(moved=moved_plans(), seed=st.integers(0, 2**32))
def test_no_run_reads_what_was_never_there_or_is_overwritten(moved: Moved, seed: int) -> None:
    for number in range(4):
        execute(moved, random.Random(seed + number))


def execute(moved: Moved, generator: random.Random) -> None:
    """Run a plan: streams are queues that go on at random, and runs take time."""
    memory, plan = Memory(moved), moved.plan
    for name in plan.inputs:
        if name in plan.device_of:
            memory.write(name)
    for begins, index in interleaved(plan, generator):
        (memory.begin if begins else memory.end)(index)
    for name in (*plan.inputs, *plan.outputs):
        if name in plan.device_of:
            memory.require(name)


@settings(deadline=None, max_examples=200)
@given(moved=moved_plans(gpus=1))
def test_on_one_device_what_is_free_lies_in_its_place(moved: Moved) -> None:
    inside, plan = moved.inside, moved.plan
    free = left_in_place(moved.moves, moved.ends)
    for name, move in moved.moves.items():
        if isinstance(move, Joined):
            assert name in free
            assert all(part in inside for part in move.parts)
        elif isinstance(move, Cut):
            own = Place(move.source, 0) if move.source not in inside else inside[move.source]
            there = Place(own.root, own.start_nbytes + move.start_nbytes)
            assert name not in free or inside[move.output] == there
    assert inside.keys().isdisjoint({*plan.inputs, *plan.outputs})


def chained(*operations: Operation) -> ExecutionPlan:
    """A plan of these, the last of which writes the output."""
    return Problem(operations, operations[-1].writes).plan()


def test_parts_and_pieces_of_parts_lie_in_the_outermost_whole() -> None:
    fused = [
        replace(operation(name, 0, reads), is_fused=True)
        for name, reads in (("inner", "a b"), ("outer", "inner c"), ("piece", "inner"))
    ]
    plan = chained(
        operation("a", 0, "x"), operation("b", 0, "x"), operation("c", 0, "x"),
        *fused, operation("y", 0, "outer piece"),
    )  # fmt: skip
    moves: dict[str, Move] = {
        "inner": Joined(("a", "b"), "inner", (0, 32)),
        "outer": Joined(("inner", "c"), "outer", (0, 64)),
        "piece": Cut("inner", "piece", 16, 32, 64),
    }
    inside = places_inside(plan, moves, {"y"})
    assert inside == {
        "a": Place("outer", 0), "b": Place("outer", 32), "inner": Place("outer", 0),
        "c": Place("outer", 64), "piece": Place("outer", 16),
    }  # fmt: skip
    assert places_inside(plan, moves, {"y", "piece"}).keys() == inside.keys() - {"piece"}


@given(data=st.data())
def test_what_does_not_lie_in_its_whole_is_named(data: DataObject) -> None:
    size = data.draw(st.integers(0, 100))
    start = data.draw(st.integers(-100, 200))
    inside, nbytes = {"a": Place("b", start)}, {"a": size, "b": 100}
    if start >= 0 and start + size <= 100:
        check_places(inside, nbytes)
    else:
        with pytest.raises(PlanError, match="'a' does not lie in 'b'"):
            check_places(inside, nbytes)
    with pytest.raises(PlanError, match="'a' does not lie in 'b'"):
        check_places({"a": Place("b", 0), "b": Place("c", 0)}, {**nbytes, "c": ALIGNMENT_NBYTES})
