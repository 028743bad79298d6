"""check_schedule lets valid schedules pass and names each violation."""

from __future__ import annotations

import pytest

from onnxsched.machine import Machine
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ScheduleError
from support.graphs import graph_of
from support.strategies import GPU

GRAPH = graph_of(3, [(0, 1), (0, 2)])
MACHINE = Machine((GPU,), 2)
FIRST, SECOND = MACHINE.placements


def test_a_valid_schedule_passes() -> None:
    schedule = Schedule((Slot(0, FIRST), Slot(2, SECOND), Slot(1, FIRST)))
    check_schedule(GRAPH, MACHINE, schedule)
    assert schedule.placement_of == {0: FIRST, 1: FIRST, 2: SECOND}
    assert schedule.stream_count == 2


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([(0, FIRST), (1, FIRST)], "'operator_2' is never launched"),
        ([(0, FIRST), (1, FIRST), (1, SECOND), (2, FIRST)], "'operator_1' is launched twice"),
        ([(1, FIRST), (0, FIRST), (2, FIRST)], "'operator_1' is launched before 'operator_0'"),
        ([(0, FIRST), (3, FIRST)], "operator 3, not in graph"),
        ([(0, FIRST), (-1, FIRST)], "operator -1, not in graph"),
        ([(0, Placement(GPU, 2))], "cuda:0/2, not in"),
        ([(0, Placement(GPU, -1))], "cuda:0/-1, not in"),
        ([(0, Placement(Device("cuda", 1), 0))], "cuda:1/0, not in"),
    ],
)
def test_a_violation_is_named(slots: list[tuple[int, Placement]], message: str) -> None:
    schedule = Schedule(tuple(Slot(*slot) for slot in slots))
    with pytest.raises(ScheduleError, match=message):
        check_schedule(GRAPH, MACHINE, schedule)


def test_shapes_tell_streams_from_devices_and_not_how_either_is_numbered() -> None:
    def shape(*places: tuple[int, int]) -> bytes:
        slots = (
            Slot(v, Placement(Device("cuda", device), stream))
            for v, (device, stream) in enumerate(places)
        )
        return Schedule(tuple(slots)).shape

    assert (
        shape((0, 0), (0, 1), (0, 0))
        == shape((0, 3), (0, 0), (0, 3))
        == shape((1, 0), (1, 1), (1, 0))
    )
    assert shape((0, 0), (1, 0)) == shape((1, 0), (0, 0)) != shape((0, 0), (0, 1))
    assert shape((0, 0), (1, 0)) != shape((0, 0), (0, 0))
