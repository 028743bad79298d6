"""What schedules need of each device's memory, and models that need more than one device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched.contraction import contract_chains, expand
from onnxsched.cost import TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.memory import Ledger, fits_on_first, needed_nbytes
from onnxsched.policies import POLICIES, SPREADING
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.spreading import spread
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import RoomError
from support.graphs import durations
from support.strategies import DEVICES, device_problems, machines, weighty_graphs


def needs(graph: OperatorGraph, schedule: Schedule) -> dict[Device, int]:
    return needed_nbytes(graph, [s.operator for s in schedule.slots], schedule.placement_of)


def placed(data: DataObject, graph: OperatorGraph, machine: Machine) -> Schedule:
    return Schedule(
        tuple(Slot(v, data.draw(st.sampled_from(machine.placements))) for v in range(len(graph)))
    )


def any_run(data: DataObject, graph: OperatorGraph, schedule: Schedule) -> dict[Device, int]:
    """What each device holds at most in one of all the ways in which a schedule can run.

    An operator's outputs and copies of them are there once it has started, and until all that
    read them on the device, or anywhere for its own device, have finished.
    """
    queues: dict[Placement, list[int]] = defaultdict(list)
    for slot in schedule.slots:
        queues[slot.placement].append(slot.operator)
    device_of = {v: place.device for v, place in schedule.placement_of.items()}
    started: set[int] = set()
    finished: set[int] = set()
    peak: dict[Device, int] = defaultdict(int)
    while any(queues.values()):
        startable = [
            place
            for place, queue in queues.items()
            if queue
            and queue[0] not in started
            and all(p in finished for p in graph.predecessors[queue[0]])
        ]
        endable = [place for place, queue in queues.items() if queue and queue[0] in started]
        place = data.draw(st.sampled_from(sorted({*startable, *endable})))
        if place in startable:
            started.add(queues[place][0])
        else:
            finished.add(queues[place].pop(0))
        for device in set(device_of.values()):
            here = [v for v in device_of if device_of[v] == device]
            held = sum(
                {w.tensor: w.nbytes for v in here for w in graph.operators[v].weights}.values()
            )
            held += sum(graph.operators[v].kept_nbytes for v in here if v in started)
            held += sum(graph.operators[v].scratch_nbytes for v in here if v in started - finished)
            for edges in graph.tensors.values():
                readers = [e.consumer for e in edges]
                if device_of[edges[0].producer] != device:
                    readers = [v for v in readers if device_of[v] == device]
                if edges[0].producer in started and not finished.issuperset(readers):
                    held += edges[0].nbytes
            peak[device] = max(peak[device], held)
    return peak


@settings(deadline=None, max_examples=200)
@given(graph=weighty_graphs(7), machine=machines(max_devices=3), data=st.data())
def test_no_run_needs_more(graph: OperatorGraph, machine: Machine, data: DataObject) -> None:
    schedule = placed(data, graph, machine)
    bound = needs(graph, schedule)
    for device, nbytes in any_run(data, graph, schedule).items():
        assert nbytes <= bound[device]


@settings(deadline=None)
@given(graph=weighty_graphs(7), data=st.data())
def test_one_stream_needs_exactly_that(graph: OperatorGraph, data: DataObject) -> None:
    schedule = Schedule(tuple(Slot(v, Placement(DEVICES[0], 0)) for v in range(len(graph))))
    kept = sum(operator.kept_nbytes for operator in graph.operators)
    bound, seen = needs(graph, schedule), any_run(data, graph, schedule)
    for device, nbytes in bound.items():
        assert nbytes - kept <= seen[device] <= nbytes


@settings(deadline=None)
@given(graph=weighty_graphs(), machine=machines(max_devices=3), data=st.data())
def test_no_device_needs_more_than_all_there_is(
    graph: OperatorGraph, machine: Machine, data: DataObject
) -> None:
    for nbytes in needs(graph, placed(data, graph, machine)).values():
        assert nbytes <= graph.total_nbytes


@settings(deadline=None)
@given(graph=weighty_graphs(), machine=machines(max_devices=3), data=st.data())
def test_a_ledger_never_takes_less(
    graph: OperatorGraph, machine: Machine, data: DataObject
) -> None:
    schedule = placed(data, graph, machine)
    room = 1 << 30
    ledger = Ledger(graph, replace(machine, memory_nbytes=dict.fromkeys(DEVICES, room)))
    left: dict[Device, float] = {}
    for slot in schedule.slots:
        device = slot.placement.device
        left[device] = ledger.left_nbytes(slot.operator, device)
        ledger.place(slot.operator, device)
    for device, nbytes in needs(graph, schedule).items():
        assert nbytes <= room - left[device]


@settings(deadline=None)
@given(graph=weighty_graphs(), machine=machines(max_devices=3), data=st.data())
def test_chains_need_no_less_than_their_operators(
    graph: OperatorGraph, machine: Machine, data: DataObject
) -> None:
    contraction = contract_chains(graph)
    schedule = placed(data, contraction.graph, machine)
    bound = needs(contraction.graph, schedule)
    for device, nbytes in needs(graph, expand(contraction, schedule)).items():
        assert nbytes <= bound[device]


def tower() -> OperatorGraph:
    """Four operators in a row with 100 bytes of weights each, and two more that share some."""
    weights = [Weight(f"w{v}", 100) for v in (0, 1, 2, 3, 0, 1)]
    return OperatorGraph(
        tuple(Operator(f"o{v}", "Op", weights=(w,)) for v, w in enumerate(weights)),
        tuple(Edge(v, v + 1, f"t{v}", 10) for v in range(5)),
    )


def limited(count: int, nbytes: int) -> Machine:
    devices = DEVICES[:count]
    return Machine(devices, 2, dict.fromkeys(devices, nbytes))


def test_shared_weights_count_once_and_tensors_until_they_are_read() -> None:
    one = Schedule(tuple(Slot(v, Placement(DEVICES[0], 0)) for v in range(6)))
    assert needs(tower(), one) == {DEVICES[0]: 400 + 20}
    halves = Schedule(tuple(Slot(v, Placement(DEVICES[v // 3], 0)) for v in range(6)))
    assert needs(tower(), halves) == {DEVICES[0]: 300 + 20 + 10, DEVICES[1]: 300 + 20 + 10}


def test_a_schedule_that_needs_too_much_is_refused() -> None:
    one = Schedule(tuple(Slot(v, Placement(DEVICES[0], 0)) for v in range(6)))
    check_schedule(tower(), limited(1, 420), one)
    with pytest.raises(RoomError, match="up to 420 bytes on cuda:0, which has 419"):
        check_schedule(tower(), limited(1, 419), one)


@pytest.mark.parametrize("name", SPREADING)
def test_a_model_too_large_for_one_device_is_spread(name: str) -> None:
    graph, cost = tower(), durations(*[4.0] * 6)
    for count, nbytes in ((1, 420), (2, 340), (3, 230)):
        machine = limited(count, nbytes)
        schedule = POLICIES[name](graph, cost, machine)
        check_schedule(graph, machine, schedule)
        device_count = len({place.device for place in schedule.placement_of.values()})
        assert min(count, 2) <= device_count <= count


@pytest.mark.parametrize("name", SPREADING)
def test_a_model_too_large_for_all_devices_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(RoomError, match="does not fit into the memory of cuda:0 with 99 b"):
        POLICIES[name](tower(), durations(*[4.0] * 6), limited(3, 99))


@settings(deadline=None)
@given(graph=weighty_graphs())
def test_spreading_fills_one_device_exactly(graph: OperatorGraph) -> None:
    in_order = Schedule(tuple(Slot(v, Placement(DEVICES[0], 0)) for v in range(len(graph))))
    nbytes = needs(graph, in_order).get(DEVICES[0], 0)
    assert spread(graph, limited(1, nbytes)) == in_order
    if nbytes:
        with pytest.raises(RoomError):
            spread(graph, limited(1, nbytes - 1))


@given(graph=weighty_graphs(), share=st.floats(0.0, 1.0))
def test_a_smaller_device_is_no_hindrance(graph: OperatorGraph, share: float) -> None:
    in_order = Schedule(tuple(Slot(v, Placement(DEVICES[1], 0)) for v in range(len(graph))))
    nbytes = needs(graph, in_order).get(DEVICES[1], 0)
    rooms = {DEVICES[0]: int(share * nbytes), DEVICES[1]: nbytes}
    machine = Machine(DEVICES[:2], 1, rooms)
    check_schedule(graph, machine, spread(graph, machine))


@settings(deadline=None)
@given(graph=weighty_graphs(), nbytes=st.integers(0, 40_000), count=st.integers(1, 8))
def test_what_is_spread_fits(graph: OperatorGraph, nbytes: int, count: int) -> None:
    machine = limited(count, nbytes)
    try:
        schedule = spread(graph, machine)
    except RoomError:
        return
    check_schedule(graph, machine, schedule)


@given(problem=device_problems())
def test_one_device_holds_what_its_one_stream_may_hold(
    problem: tuple[OperatorGraph, TableCost, Machine],
) -> None:
    graph, cost, machine = problem
    one_stream = POLICIES["sequential"](graph, cost, machine)
    try:
        check_schedule(graph, machine, one_stream)
    except RoomError:
        assert not fits_on_first(graph, machine)
    else:
        assert fits_on_first(graph, machine)
