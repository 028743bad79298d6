"""Plans over several processes: right in every interleaving, and none waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import PlanError, UsageError
from onnxsched_runtime.plan import (
    ExecutionPlan,
    Operation,
    Receive,
    Record,
    Run,
    Send,
    Step,
    Wait,
    check_plan,
)
from onnxsched_runtime.ranks import split_plan, spread, transfers
from onnxsched_runtime.rendezvous import check_ranks
from support.plans import Problem, damaged, is_right, problems, with_steps

Value = tuple[str, tuple[object, ...]]


@dataclass(frozen=True)
class Case:
    """A plan and the processes that it is run by."""

    problem: Problem
    plan: ExecutionPlan
    rank_of: Mapping[Device, int]
    rank_count: int

    def split(self) -> tuple[ExecutionPlan, ...]:
        return split_plan(self.plan, self.rank_of, self.rank_count)


@st.composite
def cases(draw: DrawFn, max_operations: int = 12, least: int = 1) -> Case:
    """Random plans over up to four devices, which belong to ranks in any way."""
    problem = draw(problems(max_operations=max_operations, streams=2, gpus=4))
    devices = [Device("cuda", index) for index in range(4)]
    rank_count = draw(st.integers(least, 4))
    extra = [draw(st.integers(0, rank_count - 1)) for _ in devices[rank_count:]]
    owners = draw(st.permutations([*range(rank_count), *extra]))
    return Case(problem, problem.plan(), dict(zip(devices, owners, strict=True)), rank_count)


@dataclass
class Process:
    """A rank that runs its plan: streams side by side, pieces one after another."""

    plan: ExecutionPlan
    values: dict[str, Value]
    piece: int = 0
    lanes: dict[Placement, list[Step]] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)

    def fronts(self) -> list[Step]:
        """What its streams are at, but for waits on what is not recorded yet."""
        while not any(self.lanes.values()) and self.piece < len(self.plan.pieces):
            self.recorded.clear()
            for step in self.plan.pieces[self.piece].steps:
                self.lanes.setdefault(self.plan.placement_of(step), []).append(step)
            self.piece += 1
        firsts = [lane[0] for lane in self.lanes.values() if lane]
        return [s for s in firsts if not isinstance(s, Wait) or s.event in self.recorded]

    def do(self, step: Step, by_name: Mapping[str, Operation]) -> None:
        """Do the step that a stream is at."""
        self.lanes[self.plan.placement_of(step)].pop(0)
        if isinstance(step, Record):
            self.recorded.add(step.event)
        elif isinstance(step, Run):
            segment = self.plan.segments[step.segment]
            if self.plan.is_copy(step.segment):
                self.values[segment.outputs[0]] = self.values[segment.inputs[0]]
                return
            seen = {self.plan.original(t): self.values[t] for t in segment.inputs}
            for name in segment.nodes:
                read = tuple(seen[tensor] for tensor in by_name[name].reads)
                seen |= {t: (f"{name}:{t}", read) for t in by_name[name].writes}
            self.values |= {tensor: seen[tensor] for tensor in segment.outputs}


def run(case: Case, plans: Sequence[ExecutionPlan], seed: int) -> list[Process]:
    """Run all ranks until none can go on: sending blocks until the other side receives."""
    generator = random.Random(seed)
    by_name = {operation.name: operation for operation in case.problem.operations}
    given = {name: (name, ()) for name in case.problem.inputs}
    processes = [
        Process(plan, dict(given) if rank == 0 else {}) for rank, plan in enumerate(plans)
    ]
    while True:
        fronts = {rank: process.fronts() for rank, process in enumerate(processes)}
        ready: list[tuple[int, Step, Step | None]] = []
        for rank, steps in fronts.items():
            for step in steps:
                if not isinstance(step, Send | Receive):
                    ready.append((rank, step, None))
                elif isinstance(step, Send):
                    ready += [
                        (rank, step, other)
                        for other in fronts[step.rank]
                        if isinstance(other, Receive)
                        and (other.tensor, other.rank) == (step.tensor, rank)
                    ]
        if not ready:
            return processes
        rank, step, other = generator.choice(ready)
        processes[rank].do(step, by_name)
        if isinstance(step, Send) and other is not None:
            processes[step.rank].do(other, by_name)
            processes[step.rank].values[step.tensor] = processes[rank].values[step.tensor]


def is_done(process: Process) -> bool:
    return process.piece == len(process.plan.pieces) and not any(process.lanes.values())


def issued(plan: ExecutionPlan) -> list[Send | Receive]:
    """What a rank sends and receives in the order in which it issues that."""
    steps = (step for piece in plan.pieces for step in piece.steps)
    return [step for step in steps if isinstance(step, Send | Receive)]


def is_stuck(plans: Sequence[ExecutionPlan]) -> bool:
    """Whether ranks that do one thing after another wait for ever."""
    left = [issued(plan) for plan in plans]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(left):
            if not steps or not isinstance(send := steps[0], Send):
                continue
            wanted = (Receive, send.tensor, rank)
            if [(type(s), s.tensor, s.rank) for s in left[send.rank][:1]] == [wanted]:
                left[send.rank].pop(0)
                steps.pop(0)
                moved = True
    return any(left)


@settings(deadline=None, max_examples=150)
@given(case=cases(), seed=st.integers(0, 3))
def test_ranks_compute_the_model_and_none_waits_for_ever(case: Case, seed: int) -> None:
    plans = case.split()
    check_ranks(plans)
    assert not is_stuck(plans)
    expected: dict[str, Value] = {name: (name, ()) for name in case.problem.inputs}
    for operation in case.problem.operations:
        read = tuple(expected[tensor] for tensor in operation.reads)
        expected |= {tensor: (f"{operation.name}:{tensor}", read) for tensor in operation.writes}
    processes = run(case, plans, seed)
    assert all(map(is_done, processes))
    assert all(processes[0].values[t] == expected[t] for t in case.problem.outputs)


@settings(deadline=None)
@given(case=cases())
def test_each_operation_runs_on_the_rank_that_owns_its_device(case: Case) -> None:
    found = Counter(
        (rank, name)
        for rank, plan in enumerate(case.split())
        for index, segment in enumerate(plan.segments)
        if not plan.is_copy(index)
        for name in segment.nodes
    )
    home = {
        name: case.rank_of[segment.placement.device]
        for index, segment in enumerate(case.plan.segments)
        if not case.plan.is_copy(index)
        for name in segment.nodes
    }
    assert found == Counter((home[o.name], o.name) for o in case.problem.operations)


@settings(deadline=None)
@given(case=cases())
def test_a_tensor_crosses_once_to_each_rank_that_needs_it(case: Case) -> None:
    plans = case.split()
    received = Counter((s.tensor, r) for r, p in enumerate(plans) for s in issued(p)
                       if isinstance(s, Receive))  # fmt: skip
    held = dict.fromkeys(case.problem.inputs, 0)
    needed = {(tensor, 0) for tensor in case.problem.outputs}
    for segment in case.plan.segments:
        rank = case.rank_of[segment.placement.device]
        if not case.plan.copies.keys() & set(segment.outputs):
            held |= dict.fromkeys(segment.outputs, rank)
            needed |= {(case.plan.original(tensor), rank) for tensor in segment.inputs}
    wanted = {(tensor, rank) for tensor, rank in needed if held[tensor] != rank}
    assert received == Counter(wanted)
    assert Counter((t.tensor, t.target) for t in transfers(case.plan, case.rank_of)) == received


def local_operations(plan: ExecutionPlan, problem: Problem) -> list[Operation]:
    """The operations of a rank, reading what the rank calls the tensors."""
    by_name = {operation.name: operation for operation in problem.operations}
    found = []
    for index, segment in enumerate(plan.segments):
        if plan.is_copy(index):
            (name,) = segment.nodes
            found.append(Operation(name, segment.placement, segment.inputs, segment.outputs))
            continue
        local = {plan.original(tensor): tensor for tensor in segment.inputs}
        for operation in map(by_name.__getitem__, segment.nodes):
            reads = tuple(local.get(tensor, tensor) for tensor in operation.reads)
            found.append(replace(operation, reads=reads))
    return found


@settings(deadline=None, max_examples=150)
@given(case=cases(max_operations=8, least=2), data=st.data())
def test_a_damaged_rank_is_found(case: Case, data: DataObject) -> None:
    plan = data.draw(
        st.sampled_from([plan for plan in case.split() if plan.pieces] or [case.plan])
    )
    operations = local_operations(plan, case.problem)
    check_plan(plan, operations)
    broken = data.draw(damaged(plan))
    # What is sent is read, so it must have been written or received somewhere before.
    if is_right(broken) and is_complete(broken):
        check_plan(broken, operations)
    else:
        with pytest.raises(PlanError):
            check_plan(broken, operations)


def is_complete(plan: ExecutionPlan) -> bool:
    """Whether everything that is read or returned is given or written, and that in time."""
    written = set(plan.inputs)
    for step in (step for piece in plan.pieces for step in piece.steps):
        if not written.issuperset(plan.reads(step)):
            return False
        written.update(plan.writes(step))
    return written.issuperset(plan.outputs)


@st.composite
def disturbed(draw: DrawFn, plans: Sequence[ExecutionPlan]) -> list[ExecutionPlan]:
    """The plans with something sent or received elsewhere, not at all, or at another time."""
    ranks = [rank for rank, plan in enumerate(plans) if issued(plan)]
    rank = draw(st.sampled_from(ranks))
    places = [
        (number, position)
        for number, piece in enumerate(plans[rank].pieces)
        for position, step in enumerate(piece.steps)
        if isinstance(step, Send | Receive)
    ]
    number, position = draw(st.sampled_from(places))
    steps = list(plans[rank].pieces[number].steps)
    kind = draw(st.sampled_from(["drop", "redirect", "turn", "move"]))
    step = steps[position]
    assert isinstance(step, Send | Receive)
    if kind == "drop":
        del steps[position]
    elif kind == "redirect":
        steps[position] = replace(step, rank=draw(st.integers(0, len(plans) - 1)))
    elif kind == "turn":
        turned = Receive if isinstance(step, Send) else Send
        steps[position] = turned(step.tensor, step.rank, step.placement)
    else:
        steps.insert(draw(st.integers(0, len(steps) - 1)), steps.pop(position))
    return [with_steps(p, number, steps) if r == rank else p for r, p in enumerate(plans)]


@settings(deadline=None, max_examples=200)
@given(case=cases(least=2), data=st.data())
def test_what_does_not_fit_together_is_found(case: Case, data: DataObject) -> None:
    plans = case.split()
    if not any(map(issued, plans)):
        return
    broken = data.draw(disturbed(plans))
    if is_stuck(broken):
        with pytest.raises(PlanError, match=r"[Rr]ank"):
            check_ranks(broken)
    else:
        check_ranks(broken)


def transfer(kind: type[Send] | type[Receive], tensor: str, rank: int) -> Step:
    return kind(tensor, rank, Placement(Device("cpu"), rank))


def exchanging(*steps: Sequence[Step]) -> list[ExecutionPlan]:
    """The plans of ranks that take these steps."""
    case = Problem((Operation("a", Placement(Device("cpu"), 0), ("x",), ("a",)),), ("a",))
    (piece,) = case.plan().pieces
    return [replace(case.plan(), pieces=(replace(piece, steps=tuple(own)),)) for own in steps]


def test_waiting_in_a_circle_is_refused() -> None:
    plans = exchanging(
        [transfer(Send, "a", 1), transfer(Receive, "c", 2)],
        [transfer(Send, "b", 2), transfer(Receive, "a", 0)],
        [transfer(Send, "c", 0), transfer(Receive, "b", 1)],
    )
    with pytest.raises(PlanError, match="Rank 0 waits for ever for rank 1 to receive 'a'"):
        check_ranks(plans)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [transfer(Send, "a", 0), transfer(Receive, "a", 0)],
            "'a' can't go from rank 0 to rank 0",
        ),
        ([transfer(Send, "a", 2)], "'a' can't go from rank 0 to rank 2"),
        ([transfer(Receive, "a", -1)], "'a' can't go from rank -1 to rank 0"),
        ([transfer(Send, "b", 1)], r"Rank 0 sends \['b'\] to rank 1, which receives \[\]"),
    ],
)
def test_transfers_without_a_peer_are_refused(steps: Sequence[Step], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_ranks(exchanging(steps, []))


def test_a_tensor_goes_once_to_each_rank() -> None:
    check_ranks(exchanging([transfer(Send, "a", 1)], [transfer(Receive, "a", 0)]))
    with pytest.raises(PlanError, match="Rank 0 sends a tensor twice to rank 1"):
        check_ranks(exchanging([transfer(Send, "a", 1)] * 2, [transfer(Receive, "a", 0)] * 2))


@given(count=st.integers(1, 12), data=st.data())
def test_devices_are_divided_evenly_in_order(count: int, data: DataObject) -> None:
    devices = [Device("cuda", index) for index in range(count)]
    rank_count = data.draw(st.integers(1, count))
    owners = list(spread(devices, rank_count).values())
    assert owners == sorted(owners)
    sizes = Counter(owners)
    assert set(sizes) == set(range(rank_count))
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="uses cpu:0, too few for 2 processes; start 1 or fewer"):
        spread([Device("cpu")], 2)
