"""Schedules are files that other tools can write, and nothing in them is trusted."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched.graph import OperatorGraph, Weight
from onnxsched.machine import Machine
from onnxsched.pipeline import optimize
from onnxsched.schedule import Schedule, Slot
from onnxsched.schedule_file import (
    LARGEST_STREAM,
    VERSION,
    Placed,
    ScheduleFile,
    placements_from_json,
    placements_to_json,
    read_schedule_file,
    schedule_of,
)
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError
from support.documents import code_blocks
from support.graphs import graph_of
from support.strategies import DEVICES, graphs

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "schedule.schema.json").read_text(encoding="utf-8"))
MACHINE = Machine(DEVICES, LARGEST_STREAM + 1)
DIAMOND = graph_of(4, [(0, 1), (0, 2), (1, 3), (2, 3)])


@st.composite
def schedules(draw: DrawFn) -> tuple[OperatorGraph, Schedule]:
    """A graph and any schedule of it over eight devices."""
    graph = draw(graphs().filter(len))
    left = set(range(len(graph)))
    slots = []
    while left:
        ready = [v for v in sorted(left) if left.isdisjoint(graph.predecessors[v])]
        operator = draw(st.sampled_from(ready))
        left.remove(operator)
        stream = draw(st.sampled_from([0, 1, 2, LARGEST_STREAM]))
        slots.append(Slot(operator, Placement(draw(st.sampled_from(DEVICES)), stream)))
    return graph, Schedule(tuple(slots))


def names_of(graph: OperatorGraph, schedule: Schedule) -> dict[str, Placement]:
    return {graph.operators[slot.operator].name: slot.placement for slot in schedule.slots}


def obeyed(graph: OperatorGraph, placed: Placed, machine: Machine = MACHINE) -> Schedule:
    return schedule_of(ScheduleFile(Path("s.json"), placed), graph, machine)


@given(problem=schedules())
def test_what_is_written_is_read_and_obeyed(problem: tuple[OperatorGraph, Schedule]) -> None:
    graph, schedule = problem
    placements = names_of(graph, schedule)
    placed = placements_from_json(json.loads(json.dumps(placements_to_json(placements))))
    assert placed == tuple(placements.items())
    file = ScheduleFile(Path("s.json"), placed)
    assert file.devices == schedule.devices
    assert file.stream_count - 1 in {placement.stream for placement in placements.values()}
    machine = Machine(file.devices, file.stream_count)
    assert schedule_of(file, graph, machine) == schedule


@given(problem=schedules(), data=st.data())
def test_what_breaks_a_law_is_refused_by_the_operators_name(
    problem: tuple[OperatorGraph, Schedule], data: st.DataObject
) -> None:
    graph, schedule = problem
    placed = tuple(names_of(graph, schedule).items())
    number = data.draw(st.integers(0, len(placed) - 1))
    name, placement = placed[number]
    rest = placed[:number] + placed[number + 1 :]
    with pytest.raises(UsageError, match=f"does not place operator '{name}'; place every"):
        obeyed(graph, rest)
    with pytest.raises(UsageError, match=f"Operator '{name}' is launched twice"):
        obeyed(graph, (*placed, placed[number]))
    with pytest.raises(UsageError, match="places operator 'stranger', not in the model"):
        obeyed(graph, (*rest, ("stranger", placement)))
    elsewhere = (name, Placement(Device("cuda", 8), 0))
    with pytest.raises(UsageError, match=f"operator '{name}' on cuda:8, which --device does not"):
        obeyed(graph, (*rest, elsewhere))
    if graph.successors[schedule.slots[number].operator]:
        with pytest.raises(UsageError, match=f"is launched before '{name}' that it reads"):
            obeyed(graph, (*rest, placed[number]))


def test_the_first_of_many_strangers_is_named_and_the_others_are_counted() -> None:
    places = {name: Placement(DEVICES[0], 0) for name in "abc"}
    with pytest.raises(UsageError, match=r"'s.json' places operator 'a' and 2 more, not in the"):
        obeyed(DIAMOND, tuple(places.items()))
    one = (("operator_2", Placement(DEVICES[0], 0)),)
    with pytest.raises(UsageError, match="does not place operator 'operator_0' and 2 more"):
        obeyed(DIAMOND, one)


def test_memory_is_kept_to() -> None:
    graph = replace(
        DIAMOND,
        operators=tuple(replace(o, weights=(Weight("w", 100),)) for o in DIAMOND.operators),
    )
    placed = tuple((o.name, Placement(DEVICES[0], 0)) for o in graph.operators)
    limited = Machine(DEVICES[:2], 1, {DEVICES[0]: 50})
    with pytest.raises(UsageError, match=r"'s.json' can't be obeyed: The schedule needs up to"):
        obeyed(graph, placed, limited)


def entry(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "device": "cpu:0", "stream": 0} | fields


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it has no list of operators"),
        ([], "it has no list of operators"),
        ({"schema_version": 1}, "it has no list of operators"),
        ({"schema_version": 1, "operators": []}, "it has no list of operators"),
        ({"schema_version": 1, "operators": {"a": 1}}, "it has no list of operators"),
        ({"operators": [entry()]}, "it has schema version None, and this release reads 1"),
        ({"schema_version": 2, "operators": [entry()]}, "it has schema version 2, and this"),
        ([entry()], "it has no list of operators"),
        (["a"], "entry 0 of its operators has no name"),
        ([entry(), entry(name=3)], "entry 1 of its operators has no name"),
        ([entry(device=None)], "operator 'a' has no device"),
        (
            [entry(device="tpu")],
            "operator 'a' has the device 'tpu', and not cpu, cuda or cuda:INDEX; `onnxsched insp",
        ),
        ([entry(stream=-1)], "operator 'a' has no stream, which is a number from 0 to 1023"),
        ([entry(stream=1024)], "operator 'a' has no stream"),
        ([entry(stream=True)], "operator 'a' has no stream"),
        ([entry(stream=1.5)], "operator 'a' has no stream"),
        ([entry(stream=float("inf"))], "operator 'a' has no stream"),
        ([entry(stream="1")], "operator 'a' has no stream"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_sentence(
    content: Any, reason: str, tmp_path: Path
) -> None:
    if isinstance(content, list) and content and content != [entry()]:
        content = {"schema_version": VERSION, "operators": content}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        read_schedule_file(path)
    assert str(caught.value).startswith(f"'{path}' is no schedule: {reason}")
    assert str(caught.value).endswith(".")
    assert caught.value.exit_code == 2


def test_a_stream_that_is_written_as_a_float_is_what_the_schema_says(tmp_path: Path) -> None:
    content = {"schema_version": VERSION, "operators": [entry(stream=1.0)]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    ((_, placement),) = read_schedule_file(path).placed
    assert placement == Placement(Device("cpu"), 1)
    assert type(placement.stream) is int


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_pipe_is_no_file_that_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        UsageError, match=r"pipe' is no regular file to read a schedule from; `onn"
    ):
        read_schedule_file(tmp_path / "pipe")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b"<xml/>"])
def test_what_is_no_json_is_refused_in_a_sentence(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(text)
    with pytest.raises(UsageError, match="is no schedule: ") as caught:
        read_schedule_file(path)
    assert "\n" not in str(caught.value)
    for missing in (tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match="There is no file"):
            read_schedule_file(missing)


@pytest.mark.parametrize("target", ["s.json", "folder/../s.json", "link.json"])
def test_the_model_is_not_written_over_its_schedule(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "s.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("s.json")
    with pytest.raises(
        UsageError, match="is a file that this command reads or writes, too; give another"
    ):
        optimize("none.onnx", tmp_path / target, schedule=tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == "{}"


def test_a_folder_that_no_name_fits_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        optimize("none.onnx", tmp_path / ("n" * 300) / "out.onnx")


def test_fields_that_others_add_are_ignored() -> None:
    content = {
        "schema_version": VERSION,
        "made_by": "another tool",
        "operators": [entry(start_us=1.5)],
    }
    assert placements_from_json(content) == (("a", Placement(Device("cpu"), 0)),)


def test_the_example_in_the_documentation_is_one() -> None:
    [example] = code_blocks((DOCS / "annotation.md").read_text(encoding="utf-8"), "json")
    placed = placements_from_json(json.loads(example.text))
    assert {placement.device for _, placement in placed} == set(DEVICES[:2])


def test_the_json_schema_says_the_same() -> None:
    written = placements_to_json({"a": Placement(Device("cuda", 12), 3)})
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"]) == set(written)
    assert SCHEMA["properties"]["schema_version"] == {"const": VERSION}
    item = SCHEMA["properties"]["operators"]["items"]
    assert set(item["required"]) == set(item["properties"]) == set(written["operators"][0])
    stream = item["properties"]["stream"]
    assert (stream["minimum"], stream["maximum"]) == (0, LARGEST_STREAM)
    pattern = re.compile(item["properties"]["device"]["pattern"])
    for text in ("cuda:12", "cpu:0", "cuda", "cpu"):
        assert pattern.search(text)
        assert str(Device.parse(text)).startswith(text)
    for text in ("tpu", "cuda:", "cuda:x", "cpu:0 or 1"):
        assert not pattern.search(text)
        with pytest.raises(UsageError):
            Device.parse(text)
