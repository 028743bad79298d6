"""Chains are contracted, scheduled as one, and expanded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.contraction import contract_chains, contract_cost, expand, settled
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import Edge, OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import check_schedule
from onnxsched.simulate import critical_path_us, simulate, total_us
from onnxsched_runtime.device import Device
from support.graphs import durations, graph_of, linear
from support.strategies import GPU, machines, problems


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=100)
@given(problem=problems(), machine=machines(max_devices=2))
def test_expanding_a_schedule_keeps_it_valid_and_as_fast(
    name: str, problem: tuple[OperatorGraph, TableCost], machine: Machine
) -> None:
    graph, cost = problem
    contraction = contract_chains(graph)
    small_cost = contract_cost(contraction, cost)
    small = POLICIES[name](contraction.graph, small_cost, machine)
    schedule = expand(contraction, small)
    check_schedule(graph, machine, schedule)
    expected_us = simulate(contraction.graph, small_cost, small).makespan_us
    assert simulate(graph, cost, schedule).makespan_us == expected_us


def reading_inputs(graph: OperatorGraph, readers: Mapping[int, Sequence[Weight]]) -> OperatorGraph:
    """The graph with inputs of the model that operators read."""
    operators = tuple(
        replace(operator, weights=(*operator.weights, *readers.get(number, ())))
        for number, operator in enumerate(graph.operators)
    )
    return OperatorGraph(operators, graph.edges)


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=50)
@given(problem=problems(), machine=machines(max_devices=3), data=st.data())
def test_reading_an_input_elsewhere_takes_its_transfer(
    name: str, problem: tuple[OperatorGraph, TableCost], machine: Machine, data: st.DataObject
) -> None:
    graph, cost = problem
    weights = [Weight("x", 1 << 20, is_input=True), Weight("mask", 100, is_input=True)]
    kinds = st.lists(st.sampled_from(weights), max_size=2, unique=True)
    readers = {number: data.draw(kinds) for number in range(len(graph))}
    graph = reading_inputs(graph, readers)
    contraction = contract_chains(graph, with_inputs=True)
    inputs = [number for number, group in enumerate(contraction.groups) if not group]
    read = {weight.tensor for weights in readers.values() for weight in weights}
    assert {contraction.graph.operators[number].name for number in inputs} == read
    members = [member for group in contraction.groups for member in group]
    assert sorted(members) == list(range(len(graph)))
    small_cost = contract_cost(contraction, cost)
    small = settled(contraction, POLICIES[name](contraction.graph, small_cost, machine))
    assert settled(contraction, small) == small
    check_schedule(contraction.graph, replace(machine, memory_nbytes={}), small)
    schedule = expand(contraction, small)
    check_schedule(graph, machine, schedule)
    assert small.devices == schedule.devices
    timeline = simulate(contraction.graph, small_cost, small)
    for number in inputs:
        assert timeline.starts_us[number] <= timeline.finishes_us[number]
        reading = {edge.consumer for edge in contraction.graph.outgoing[number]}
        first = next(slot for slot in small.slots if slot.operator in reading)
        home = small.placement_of[number].device
        assert home == first.placement.device, "as plans have it"
        for edge in contraction.graph.outgoing[number]:
            device = small.placement_of[edge.consumer].device
            transfer_us = cost.transfer_us(edge.nbytes, home, device)
            assert timeline.starts_us[edge.consumer] >= timeline.finishes_us[number] + transfer_us


def test_what_is_cut_out_of_an_input_may_be_cut_where_the_input_is() -> None:
    kinds = ["Slice", "Conv", "Slice", "Conv", "Concat"]
    plain = graph_of(5, [(0, 1), (2, 3), (1, 4), (3, 4)])
    operators = tuple(replace(o, op_type=k) for o, k in zip(plain.operators, kinds, strict=True))
    image = Weight("x", 100, is_input=True)
    edges = tuple(replace(edge, nbytes=50) for edge in plain.edges)
    graph = reading_inputs(OperatorGraph(operators, edges), {0: [image], 2: [image]})
    assert contract_chains(graph).groups == ((0, 1), (2, 3), (4,))
    contraction = contract_chains(graph, with_inputs=True)
    assert contraction.groups == ((), (0,), (1,), (2,), (3,), (4,))
    assert [e.nbytes for e in contraction.graph.outgoing[0]] == [100, 100]
    assert contraction.graph.operators[0].name == "x"
    assert [len(operator.weights) for operator in contraction.graph.operators] == [1, *[0] * 5]
    costs = contract_cost(contraction, durations(1.0, 5.0, 1.0, 5.0, 1.0))
    assert costs.operator(0, GPU) == OperatorCost(0.0)


def test_a_chain_that_keeps_the_size_of_an_input_stays_one() -> None:
    plain = graph_of(3, [(0, 1), (1, 2)])
    image = Weight("operator_0", 1, is_input=True)
    graph = reading_inputs(plain, {0: [image], 2: [image]})
    contraction = contract_chains(graph, with_inputs=True)
    assert contraction.groups == ((), (0, 1, 2))
    names = [operator.name for operator in contraction.graph.operators]
    assert len(set(names)) == 2


@settings(deadline=None)
@given(problem=problems())
def test_contraction_keeps_the_bounds_and_leaves_no_chain(
    problem: tuple[OperatorGraph, TableCost],
) -> None:
    graph, cost = problem
    contraction = contract_chains(graph)
    small, small_cost = contraction.graph, contract_cost(contraction, cost)
    assert critical_path_us(small, small_cost, GPU) == critical_path_us(graph, cost, GPU)
    assert total_us(small, small_cost, GPU) == total_us(graph, cost, GPU)
    again = contract_chains(small)
    assert again.groups == tuple((operator,) for operator in range(len(small)))
    assert again.graph == small


def test_only_linear_chains_are_joined() -> None:
    graph = graph_of(8, [(0, 1), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 6), (6, 7)])
    contraction = contract_chains(graph)
    assert contraction.groups == ((0, 1), (2, 4), (3, 5), (6, 7))
    assert contraction.graph.operators[1] == replace(
        graph.operators[2], op_type="Op+Op", scratch_nbytes=1
    )
    assert contraction.graph.edges == (
        Edge(0, 1, "tensor_1_2", 1),
        Edge(0, 2, "tensor_1_3", 1),
        Edge(1, 3, "tensor_4_6", 1),
        Edge(2, 3, "tensor_5_6", 1),
    )


def test_a_chain_ends_where_capture_does() -> None:
    plain = graph_of(4, [(0, 1), (1, 2), (2, 3)])
    on_host = tuple(
        replace(operator, host_reason="a loop") if index in (1, 2) else operator
        for index, operator in enumerate(plain.operators)
    )
    contraction = contract_chains(OperatorGraph(on_host, plain.edges))
    assert contraction.groups == ((0,), (1, 2), (3,))
    assert [o.host_reason for o in contraction.graph.operators] == [None, "a loop", None]


def test_two_tensors_between_a_pair_do_not_break_a_chain() -> None:
    pair = graph_of(2, [(0, 1)])
    graph = OperatorGraph(pair.operators, (*pair.edges, Edge(0, 1, "second", 1)))
    assert contract_chains(graph).groups == ((0, 1),)


def test_costs_of_a_chain() -> None:
    graph = graph_of(2, [(0, 1)])
    cost = TableCost(
        (OperatorCost(1.0, "compute", 0.5, 1.0), OperatorCost(3.0, "memory", 0.25, 0.5)),
        unmeasured=linear(3.0, 1.0),
        contention=Contention(sm_slowdown=0.5),
    )
    chain = contract_cost(contract_chains(graph), cost)
    assert chain.operator(0, GPU) == OperatorCost(4.0, "memory", 0.5, 0.625)
    assert chain.contention == cost.contention
    assert chain.transfer_us(0, GPU, Device("cuda", 1)) == 3.0


def test_views_take_time_only_in_a_chain_of_nothing_else() -> None:
    view, product = OperatorCost(1.5, is_view=True), OperatorCost(4.0, "memory", 0.5, 0.25)
    contraction = contract_chains(graph_of(5, [(0, 1), (1, 2), (3, 4)]))
    chains = contract_cost(contraction, TableCost((view, product, view, view, view)))
    assert chains.operator(0, GPU) == product
    assert chains.operator(1, GPU) == OperatorCost(3.0, is_view=True)


def test_chains_without_costs_are_free() -> None:
    contraction = contract_chains(graph_of(3, [(0, 1), (1, 2)]))
    chain = contract_cost(contraction, durations(0.0, 0.0, 0.0))
    assert chain.operator(0, GPU).duration_us == 0.0


def with_views(graph: OperatorGraph, views: Iterable[int]) -> OperatorGraph:
    chosen = set(views)
    operators = [
        replace(operator, is_view=index in chosen)
        for index, operator in enumerate(graph.operators)
    ]
    return OperatorGraph(tuple(operators), graph.edges)


@settings(deadline=None, max_examples=200)
@given(problem=problems(), machine=machines(max_devices=2), data=st.data())
def test_views_are_joined_with_what_they_view_and_schedules_stay_valid(
    problem: tuple[OperatorGraph, TableCost], machine: Machine, data: st.DataObject
) -> None:
    graph, cost = problem
    able = [index for index in range(len(graph)) if len(graph.incoming[index]) == 1]
    chosen = data.draw(st.sets(st.sampled_from(able))) if able else set()
    graph = with_views(graph, chosen)
    contraction = contract_chains(graph)
    group_of = {member: n for n, group in enumerate(contraction.groups) for member in group}
    assert sorted(group_of) == list(range(len(graph)))
    for group in contraction.groups:
        assert list(group) == sorted(group)
        for member in group[1:]:
            assert {group_of[before] for before in graph.predecessors[member]} == {
                group_of[member]
            }
    small_cost = contract_cost(contraction, cost)
    small = POLICIES["heft"](contraction.graph, small_cost, machine)
    check_schedule(graph, machine, expand(contraction, small))


def test_views_of_what_a_split_writes_are_one_with_it() -> None:
    graph = graph_of(8, [(0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (3, 5), (4, 6), (5, 6), (6, 7)])
    assert contract_chains(with_views(graph, (2, 3, 4))).groups == ((0, 1, 2, 3, 4), (5,), (6, 7))
    assert contract_chains(graph).groups == ((0, 1), (2,), (3,), (4,), (5,), (6, 7))


def test_a_view_that_begins_a_chain_or_shares_what_it_reads_stays_apart() -> None:
    graph = graph_of(5, [(0, 1), (0, 2), (1, 3), (2, 4)])
    assert contract_chains(with_views(graph, (1, 2))).groups == ((0,), (1, 3), (2, 4))
    joins = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    same = tuple(replace(e, tensor="t") if e.producer == 0 else e for e in joins.edges)
    shared = OperatorGraph(joins.operators, same)
    assert contract_chains(with_views(shared, (1, 2))).groups == ((0,), (1,), (2,), (3,))
    assert contract_chains(with_views(joins, (1, 2))).groups == ((0, 1, 2), (3,))
