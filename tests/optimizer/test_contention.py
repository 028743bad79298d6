"""What running beside others costs: the laws of the simulation, and an example by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.policies import POLICIES
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, simulate, total_us
from onnxsched_runtime.device import Device, Placement
from support.graphs import graph_of, layered_problem
from support.strategies import GPU, contentions, machines, problems
from support.timing import at_most_cpu_s

ROUNDING = 1e-9


@st.composite
def scheduled(draw: DrawFn) -> tuple[OperatorGraph, TableCost, Schedule]:
    """A problem with contention, and a schedule of it on one device."""
    graph, cost = draw(problems())
    policy = draw(st.sampled_from(["sequential", "wavefront", "opara", "heft"]))
    schedule = POLICIES[policy](graph, cost, draw(machines()))
    return graph, replace(cost, contention=draw(contentions())), schedule


Scheduled = tuple[OperatorGraph, TableCost, Schedule]


@settings(deadline=None, max_examples=300)
@given(scheduled())
def test_nothing_starts_or_finishes_sooner_than_without_contention(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    alone = simulate(graph, replace(cost, contention=Contention()), schedule)
    beside = simulate(graph, cost, schedule)
    for us, beside_us in (
        *zip(alone.starts_us, beside.starts_us, strict=True),
        *zip(alone.finishes_us, beside.finishes_us, strict=True),
    ):
        assert beside_us >= us * (1 - ROUNDING)


@settings(deadline=None, max_examples=300)
@given(scheduled())
def test_side_by_side_is_never_slower_than_one_after_another(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    contention = cost.contention
    overhead_us = len(graph) * (contention.start_us + contention.event_us)
    most_us = total_us(graph, cost, GPU) * contention.duration_factor + overhead_us
    assert simulate(graph, cost, schedule).makespan_us <= most_us * (1 + ROUNDING)


@settings(deadline=None)
@given(scheduled())
def test_streams_run_in_order_and_tensors_are_waited_for(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    found = simulate(graph, cost, schedule)
    start_us = cost.contention.start_us
    free_us: dict[Placement, float] = {}
    for slot in schedule.slots:
        ready_us = free_us.get(slot.placement, 0.0)
        for producer in graph.predecessors[slot.operator]:
            is_here = schedule.placement_of[producer] == slot.placement
            event_us = 0.0 if is_here else cost.contention.event_us
            ready_us = max(ready_us, found.finishes_us[producer] + event_us)
        assert found.starts_us[slot.operator] == ready_us + start_us
        free_us[slot.placement] = found.finishes_us[slot.operator]


@settings(deadline=None)
@given(scheduled(), st.integers(1, 9))
def test_numbers_of_streams_do_not_matter(problem: Scheduled, shift: int) -> None:
    graph, cost, schedule = problem
    renumbered = Schedule(
        tuple(
            Slot(slot.operator, Placement(GPU, (slot.placement.stream * 7 + shift) % 37))
            for slot in schedule.slots
        )
    )
    assert simulate(graph, cost, renumbered) == simulate(graph, cost, schedule)


@settings(deadline=None)
@given(scheduled())
def test_only_the_order_on_each_stream_matters(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    found = simulate(graph, cost, schedule)
    by_start = sorted(
        schedule.slots,
        key=lambda slot: (found.starts_us[slot.operator], found.finishes_us[slot.operator]),
    )
    assert simulate(graph, cost, Schedule(tuple(by_start))) == found


@settings(deadline=None)
@given(scheduled())
def test_everything_twice_as_long_takes_twice_as_long(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    c = cost.contention
    twice = replace(
        cost,
        contention=replace(
            c,
            duration_factor=2 * c.duration_factor,
            start_us=2 * c.start_us,
            event_us=2 * c.event_us,
        ),
    )
    once_us = simulate(graph, cost, schedule).makespan_us
    assert simulate(graph, twice, schedule).makespan_us == 2 * once_us


@settings(deadline=None)
@given(scheduled())
def test_slowdowns_by_shares_of_nothing_change_nothing(problem: Scheduled) -> None:
    graph, cost, schedule = problem
    small = tuple(replace(operator, sm_share=0.0) for operator in cost.operators)
    slowing, apart = (
        replace(cost.contention, sm_slowdown=s, launch_slowdown=0.0) for s in (1.0, 0.0)
    )
    found, expected = (
        simulate(graph, TableCost(small, contention=c), schedule) for c in (slowing, apart)
    )
    assert found.starts_us == pytest.approx(expected.starts_us)
    assert found.finishes_us == pytest.approx(expected.finishes_us)


@settings(deadline=None)
@given(
    scheduled(), st.sampled_from(["duration_factor", "start_us", "event_us"]), st.floats(0.0, 3.0)
)
def test_without_slowdowns_more_of_anything_takes_longer(
    problem: Scheduled, field: str, more: float
) -> None:
    graph, cost, schedule = problem
    less = replace(cost.contention, sm_slowdown=0.0, launch_slowdown=0.0, link_share=0.0)
    larger = replace(less, **{field: getattr(less, field) + more})
    times = [
        simulate(graph, replace(cost, contention=contention), schedule).makespan_us
        for contention in (less, larger)
    ]
    assert times[0] <= times[1] * (1 + ROUNDING)


COSTS = (OperatorCost(4.0, sm_share=0.5), OperatorCost(12.0, sm_share=1.0), OperatorCost(1.0))
SLOWING = Contention(sm_slowdown=0.5, launch_slowdown=0.25)


def three_on(second: Placement) -> Timeline:
    """Two operators side by side, and one after the first."""
    here = Placement(GPU, 0)
    slots = (Slot(0, here), Slot(1, second), Slot(2, here))
    cost = TableCost(COSTS, contention=SLOWING)
    return simulate(graph_of(3, [(0, 2)]), cost, Schedule(slots))


def test_an_example_by_hand() -> None:
    # 0 takes 4 * (1 + 0.5 * 1 + 0.25) = 7; meanwhile 1 does 7 / (1 + 0.5 * 0.5 + 0.25) of its 12.
    # Then 2 takes 1.75, in which 1 does 1.75 / 1.25; the rest of 1 runs alone.
    timeline = three_on(Placement(GPU, 1))
    alone_us = 12.0 - 7.0 / 1.5 - 1.75 / 1.25
    assert timeline.starts_us == pytest.approx((0.0, 0.0, 7.0))
    assert timeline.finishes_us == pytest.approx((7.0, 8.75 + alone_us, 8.75))


def test_operators_of_different_devices_do_not_slow_each_other() -> None:
    timeline = three_on(Placement(Device("cuda", 1), 0))
    assert timeline.finishes_us == pytest.approx((4.0, 12.0, 5.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"duration_factor": 0.0},
        {"duration_factor": math.inf},
        {"start_us": -1.0},
        {"event_us": math.nan},
        {"sm_slowdown": -0.1},
        {"sm_slowdown": math.nan},
        {"sm_slowdown": 0.75, "launch_slowdown": 0.5},
    ],
)
def test_contention_that_makes_no_sense_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Contention"):
        Contention(**fields)


def test_ten_thousand_operators_take_no_two_seconds() -> None:
    graph, cost = layered_problem(layer_count=100, width=100, seed=0)
    shared = tuple(replace(operator, sm_share=0.3) for operator in cost.operators)
    slots = (Slot(v, Placement(GPU, v % 16)) for v in range(len(graph)))
    with at_most_cpu_s(2.0):
        simulate(graph, TableCost(shared, contention=SLOWING), Schedule(tuple(slots)))
