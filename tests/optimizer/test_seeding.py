"""Bands land on devices of their own, whatever else is in the graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched import proposals
from onnxsched.candidates import propose
from onnxsched.contraction import contract_chains, contract_cost, expand, uncontracted
from onnxsched.cost import TableCost
from onnxsched.graph import Operator, OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.policies import POLICIES
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.seeding import band_of, band_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.errors import RoomError, ScheduleError
from support.graphs import durations, graph_of
from support.strategies import DEVICES, device_problems

Problem = tuple[OperatorGraph, TableCost, Machine]


@st.composite
def banded_problems(draw: DrawFn) -> Problem:
    """Problems some of whose operators are called as if they were bands."""
    graph, cost, machine = draw(device_problems())
    bands = draw(
        st.lists(st.sampled_from([None, 0, 1, 2, 11]), min_size=len(graph), max_size=len(graph))
    )
    operators = tuple(
        operator if band is None else replace(operator, name=f"{operator.name}/band{band}")
        for operator, band in zip(graph.operators, bands, strict=True)
    )
    return OperatorGraph(operators, graph.edges), cost, machine


@settings(deadline=None, max_examples=200)
@given(problem=banded_problems())
def test_each_band_is_on_its_device_and_the_schedule_is_valid(problem: Problem) -> None:
    graph, cost, machine = problem
    bands = [band_of(operator.name) for operator in graph.operators]
    try:
        schedule = band_schedule(graph, cost, machine)
    except RoomError:
        assert machine.is_limited
        return
    if len(machine.devices) == 1 or all(band is None for band in bands):
        assert schedule is None
        return
    assert schedule is not None
    check_schedule(graph, machine, schedule)
    assert schedule == band_schedule(graph, cost, machine)
    if not machine.is_limited:
        for operator, placement in schedule.placement_of.items():
            number = (bands[operator] or 0) % len(machine.devices)
            assert placement.device == machine.devices[number]


@settings(deadline=None, max_examples=50)
@given(problem=banded_problems())
def test_search_starts_from_bands_too(problem: Problem) -> None:
    graph, cost, machine = problem
    try:
        schedule = band_schedule(graph, cost, machine)
    except RoomError:
        return
    if schedule is not None and not too_full(
        graph, machine, [slot.operator for slot in schedule.slots], schedule.placement_of
    ):
        found = POLICIES["search"](graph, cost, machine)
        bands_us = simulate(graph, cost, schedule).makespan_us
        assert simulate(graph, cost, found).makespan_us <= bands_us + 1e-9


@pytest.mark.parametrize("room_nbytes", [None, 1 << 20])
def test_a_broken_law_is_no_lack_of_room(
    room_nbytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = OperatorGraph((Operator("conv/band1", "Conv", kept_nbytes=256),), ())
    cost, contraction = durations(1.0), uncontracted(graph)
    rooms = {} if room_nbytes is None else dict.fromkeys(DEVICES[:2], room_nbytes)
    machine = Machine(DEVICES[:2], 1, rooms)
    [proposed] = proposals._bands(graph, contraction, cost, machine)
    assert proposed.schedule.devices == (DEVICES[1],)
    assert not proposals._bands(
        graph, contraction, cost, replace(machine, memory_nbytes=dict.fromkeys(DEVICES, 255))
    )
    empty = Schedule(())
    monkeypatch.setattr(proposals, "band_schedule", lambda *_: empty)
    with pytest.raises(ScheduleError, match=r"'conv/band1' is never launched"):
        proposals._bands(graph, contraction, cost, machine)
    monkeypatch.setitem(POLICIES, "heft", lambda *_: check_schedule(graph, machine, empty))
    with pytest.raises(ScheduleError, match=r"'conv/band1' is never launched"):
        propose(graph, contraction, cost, machine, ["heft"])


def test_search_goes_on_where_one_start_finds_no_room() -> None:
    operators = (
        Operator("conv/band1", "Conv", kept_nbytes=4096),
        Operator("pool", "MaxPool", kept_nbytes=256, scratch_nbytes=4096),
    )
    graph, cost = OperatorGraph(operators, ()), durations(1.0, 1.0)
    machine = Machine(DEVICES[:2], 1, {DEVICES[0]: 4608, DEVICES[1]: 4096})
    with pytest.raises(RoomError):
        POLICIES["heft"](graph, cost, machine)
    check_schedule(graph, machine, POLICIES["search"](graph, cost, machine))


@pytest.mark.parametrize(
    ("name", "band"),
    [
        ("conv/band0", 0),
        ("conv/band12", 12),
        ("t:0/band1/rows3-5", 1),
        ("t/band0/band1", 1),
        ("conv/bands", None),
        ("conv/band1x", None),
        ("band1", None),
        ("conv/band", None),
    ],
)
def test_bands_are_known_by_name(name: str, band: int | None) -> None:
    assert band_of(name) == band


def test_rows_of_a_whole_tensor_are_cut_out_where_it_is() -> None:
    names = ["stem", "stem/band1/rows4-8", "conv/band1", "conv/band1/rows5-8"]
    types = ["Conv", "Slice", "Conv", "Slice"]
    operators = tuple(Operator(*pair) for pair in zip(names, types, strict=True))
    graph = replace(graph_of(4, [(0, 1), (1, 2), (2, 3)]), operators=operators)
    schedule = band_schedule(graph, durations(1, 1, 1, 1), Machine(DEVICES[:2], 2))
    assert schedule is not None
    devices = [schedule.placement_of[v].device for v in range(4)]
    assert devices == [DEVICES[0], DEVICES[0], DEVICES[1], DEVICES[1]]


def test_rows_of_an_input_are_cut_out_where_it_is_and_only_they_cross() -> None:
    names = ["x/band0/rows0-5", "conv/band0", "x/band1/rows4-9", "conv/band1", "joined"]
    types = ["Slice", "Conv", "Slice", "Conv", "Concat"]
    image = Weight("x", 1 << 20, is_input=True)
    operators = tuple(
        Operator(name, kind, weights=(image,) if kind == "Slice" else ())
        for name, kind in zip(names, types, strict=True)
    )
    graph = replace(graph_of(5, [(0, 1), (2, 3), (1, 4), (3, 4)]), operators=operators)
    contraction = contract_chains(graph, with_inputs=True)
    cost = contract_cost(contraction, durations(1, 1, 1, 1, 1))
    schedule = band_schedule(contraction.graph, cost, Machine(DEVICES[:2], 2))
    assert schedule is not None
    placement_of = expand(contraction, schedule).placement_of
    numbers = [DEVICES.index(placement_of[v].device) for v in range(5)]
    assert numbers == [0, 0, 0, 1, 0]
