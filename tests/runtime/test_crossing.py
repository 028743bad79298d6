"""Plans over several devices: tensors cross once, and everything reads from its own device."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched_runtime.crossing import with_copies
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.plan import ExecutionPlan, Operation, check_plan
from support.plans import Problem, happens_before, is_right, problems, stream

Value = tuple[str, tuple[object, ...]]

SEVERAL = problems(max_operations=14, streams=2, gpus=3)


def computed(operations: tuple[Operation, ...], inputs: tuple[str, ...]) -> dict[str, Value]:
    """What every tensor stands for: who wrote it, from what."""
    values: dict[str, Value] = {name: (name, ()) for name in inputs}
    for operation in operations:
        read = tuple(values[tensor] for tensor in operation.reads)
        values |= {tensor: (f"{operation.name}:{tensor}", read) for tensor in operation.writes}
    return values


def run(problem: Problem, plan: ExecutionPlan, seed: int) -> dict[str, Value]:
    """Run a plan in one of the orders that its streams and events allow."""
    by_name = {operation.name: operation for operation in problem.operations}
    values: dict[str, Value] = {name: (name, ()) for name in problem.inputs}
    generator = random.Random(seed)
    graph = nx.DiGraph(happens_before(plan))
    graph.add_nodes_from(range(len(plan.segments)))
    missing = dict(graph.in_degree())
    ready = sorted((v for v, count in missing.items() if not count), key=str)
    while ready:
        vertex = ready.pop(generator.randrange(len(ready)))
        if isinstance(vertex, int):
            segment = plan.segments[vertex]
            if plan.is_copy(vertex):
                values[segment.outputs[0]] = values[segment.inputs[0]]
            else:
                seen = {plan.original(t): values[t] for t in segment.inputs}
                for name in segment.nodes:
                    operation = by_name[name]
                    read = tuple(seen[tensor] for tensor in operation.reads)
                    seen |= {t: (f"{name}:{t}", read) for t in operation.writes}
                values |= {tensor: seen[tensor] for tensor in segment.outputs}
        for reader in graph.successors(vertex):
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    return values


@settings(deadline=None, max_examples=200)
@given(problem=SEVERAL, seed=st.integers(0, 3))
def test_a_plan_over_devices_computes_the_model(problem: Problem, seed: int) -> None:
    plan = problem.plan()
    assert is_right(plan)
    expected = computed(problem.operations, problem.inputs)
    found = run(problem, plan, seed)
    assert all(found[tensor] == expected[tensor] for tensor in problem.outputs)


@settings(deadline=None, max_examples=200)
@given(problem=SEVERAL)
def test_a_tensor_crosses_once_to_each_device_that_reads_it(problem: Problem) -> None:
    plan = problem.plan()
    needed = {
        (tensor, operation.placement.device)
        for operation in problem.operations
        if operation.host_reason is None
        for tensor in operation.reads
    }
    crossed: Counter[tuple[str, Device]] = Counter()
    for index, segment in enumerate(plan.segments):
        device = segment.placement.device
        if plan.is_copy(index):
            (tensor,) = segment.inputs
            assert plan.device_of[tensor] != device
            crossed[tensor, device] += 1
        elif segment.host_reason is None:
            assert all(plan.device_of[tensor] == device for tensor in segment.inputs)
    assert set(crossed.values()) <= {1}
    assert set(crossed) == {
        (tensor, device)
        for tensor, device in needed
        if plan.device_of.get(tensor, device) != device
    }


@settings(deadline=None)
@given(problem=problems())
def test_one_device_needs_no_copies(problem: Problem) -> None:
    assert with_copies(problem.operations) == (problem.operations, {})


@settings(deadline=None)
@given(problem=problems(max_operations=8, streams=2, gpus=2, hosts=False))
def test_copies_have_streams_of_their_own_and_follow_what_they_copy(problem: Problem) -> None:
    operations, copies = with_copies(problem.operations)
    used = {operation.placement for operation in problem.operations}
    own = [o.placement for o in operations if o.name in copies]
    assert not used.intersection(own)
    assert len(set(own)) == len(own)
    place = {operation.name: i for i, operation in enumerate(operations)}
    writer = {t: operation.name for operation in operations for t in operation.writes}
    for name, tensor in copies.items():
        after = place[writer[tensor]] + 1 if tensor in writer else 0
        assert all(operation.name in copies for operation in operations[after : place[name]])


@settings(deadline=None, max_examples=50)
@given(problem=SEVERAL, every=st.integers(1, 3))
def test_tensors_and_operators_may_be_called_as_copies_are(problem: Problem, every: int) -> None:
    called = {"x": "x"}
    for number, tensor in enumerate(t for o in problem.operations for t in o.writes):
        like_a_copy = f"{list(called.values())[-1]}@cuda:{number % 2}"
        called[tensor] = tensor if number % every else like_a_copy
    operations = tuple(
        replace(
            operation,
            name=called[operation.writes[0]],
            reads=tuple(called[tensor] for tensor in operation.reads),
            writes=tuple(called[tensor] for tensor in operation.writes),
        )
        for operation in problem.operations
    )
    renamed = Problem(operations, tuple(called[tensor] for tensor in problem.outputs))
    expected = computed(operations, renamed.inputs)
    found = run(renamed, renamed.plan(), seed=0)
    assert all(found[tensor] == expected[tensor] for tensor in renamed.outputs)


def test_reading_from_another_device_is_refused() -> None:
    problem = Problem(
        (
            Operation("a", stream(0), ("x",), ("a",)),
            Operation("b", stream(0, gpu=1), ("a",), ("b",)),
        ),
        ("b",),
    )
    plan = problem.plan()
    operations, _ = with_copies(problem.operations)
    check_plan(plan, operations)
    segments = list(plan.segments)
    reader = next(i for i, s in enumerate(segments) if s.nodes == ("b",))
    segments[reader] = replace(segments[reader], inputs=("a",))
    careless = [replace(o, reads=("a",)) if o.name == "b" else o for o in operations]
    with pytest.raises(PlanError, match="on cuda:1 reads 'a' on cuda:0"):
        check_plan(replace(plan, segments=tuple(segments)), careless)


def test_a_copy_to_where_it_is_is_refused() -> None:
    problem = Problem((Operation("a", stream(0), ("x",), ("a",)),), ("a",))
    plan = problem.plan()
    (segment,) = plan.segments
    with pytest.raises(PlanError, match="makes no sense"):
        check_plan(replace(plan, segments=(segment,), copies={"a": "x"}), problem.operations)
