"""Schedules as JSON files, written by people and other tools. Pure.

docs/annotation.md describes the format, docs/schedule.schema.json defines it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ScheduleError, UsageError, absent

VERSION = 1
LARGEST_STREAM = 1023

Placed = tuple[tuple[str, Placement], ...]
"""Names of operators and their placements, in launch order."""


@dataclass(frozen=True)
class ScheduleFile:
    """What a file says, before it is held against a model."""

    path: Path
    placed: Placed
    """At least one."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices it uses, in order."""
        return tuple(sorted({placement.device for _, placement in self.placed}))

    @property
    def stream_count(self) -> int:
        """How many streams a device needs for its highest number."""
        return 1 + max(placement.stream for _, placement in self.placed)


def placements_to_json(placements: Mapping[str, Placement]) -> dict[str, Any]:
    """A JSON object of placements in launch order."""
    return {
        "schema_version": VERSION,
        "operators": [
            {"name": name, "device": str(placement.device), "stream": placement.stream}
            for name, placement in placements.items()
        ],
    }


def placements_from_json(content: Any) -> Placed:
    """Read what `placements_to_json` or another tool wrote; unknown fields are ignored.

    Raises:
        UsageError: It is no schedule; the message is a clause that says why.
    """
    operators = content.get("operators") if isinstance(content, Mapping) else None
    if not operators or not isinstance(operators, list):
        raise UsageError("it has no list of operators")
    if (version := content.get("schema_version")) != VERSION or isinstance(version, bool):
        raise UsageError(f"it has schema version {version!r}, and this release reads {VERSION}")
    return tuple(_placed(number, entry) for number, entry in enumerate(operators))


def _placed(number: int, entry: Any) -> tuple[str, Placement]:
    fields = entry if isinstance(entry, Mapping) else {}
    name, device, stream = (fields.get(key) for key in ("name", "device", "stream"))
    if not isinstance(name, str):
        raise UsageError(f"entry {number} of its operators has no name")
    if not isinstance(device, str):
        raise UsageError(f"operator '{name}' has no device")
    if isinstance(stream, float) and stream.is_integer():
        stream = int(stream)  # the schema calls it one
    if type(stream) is not int or not 0 <= stream <= LARGEST_STREAM:
        raise UsageError(
            f"operator '{name}' has no stream, which is a number from 0 to {LARGEST_STREAM}"
        )
    try:
        return name, Placement(Device.parse(device), stream)
    except UsageError as error:
        raise UsageError(
            f"operator '{name}' has the device '{device}', and not cpu, cuda or cuda:INDEX"
        ) from error


def read_schedule_file(path: str | os.PathLike[str]) -> ScheduleFile:
    """Read a file.

    Raises:
        UsageError: It is not there, or no schedule.
    """
    if not os.path.isfile(path):
        raise UsageError(
            f"{absent(path)} to read a schedule from; `onnxsched inspect --schedule` writes one."
        )
    try:
        content = json.loads(Path(path).read_bytes())
        return ScheduleFile(Path(path), placements_from_json(content))
    except (OSError, ValueError, RecursionError, UsageError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UsageError(
            f"'{path}' is no schedule: {reason}; `onnxsched inspect --schedule` writes one to "
            "start from."
        ) from error


def schedule_of(file: ScheduleFile, graph: OperatorGraph, machine: Machine) -> Schedule:
    """The schedule that a file gives to a graph. O(operators + edges).

    Args:
        file: What was read.
        graph: The operators of the model as it was loaded.
        machine: Where it is to run.

    Raises:
        UsageError: It is no schedule of this graph on this machine; names the operator.
    """
    path, placed = file.path, file.placed
    index = {operator.name: number for number, operator in enumerate(graph.operators)}
    names = dict.fromkeys(name for name, _ in placed)
    if unknown := [name for name in names if name not in index]:
        raise UsageError(
            f"'{path}' places {_first_of(unknown)}, not in the model as it is loaded; "
            "`onnxsched inspect --schedule` shows the names of an optimized one."
        )
    if missing := [name for name in index if name not in names]:
        raise UsageError(f"'{path}' does not place {_first_of(missing)}; place every operator.")
    for name, placement in placed:
        if placement.device not in machine.devices:
            raise UsageError(
                f"'{path}' places operator '{name}' on {placement.device}, which --device does "
                "not name; name it, or leave --device out."
            )
    schedule = Schedule(tuple(Slot(index[name], placement) for name, placement in placed))
    try:
        check_schedule(graph, machine, schedule)
    except ScheduleError as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"'{path}' can't be obeyed: {reason}.") from error
    return schedule


def _first_of(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"operator '{names[0]}'{others}"
