"""The commands that look at files and at the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from onnxsched.cli import render
from onnxsched.cli.app import Json, Model, Output, app
from onnxsched.cli.output import emit, require_json_target, write_json
from onnxsched_runtime.errors import UsageError, naming

_Found = TypeVar("_Found")


@app.command()
def inspect(
    model: Model,
    schedule: Annotated[
        Path | None, typer.Option(help="Write the schedule alone to a JSON file.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Show the schedule, and why what is not captured is not."""
    from onnxsched.inspection import inspect_model
    from onnxsched.schedule_file import placements_to_json
    from onnxsched_runtime.files import require_target

    if str(schedule) == "-":
        raise UsageError("--schedule - is no file, and stdout shows the result; give a path.")
    require_target("--schedule", schedule, model, models=[model])
    require_json_target(json_to, schedule, models=[model])
    with naming(model):
        found = inspect_model(model)
    if schedule is not None:
        write_json(schedule, placements_to_json(found.annotation.placements))
    emit(json_to, found.to_json(), lambda: render.inspection(found))


@app.command()
def strip(
    model: Annotated[Path, typer.Argument(metavar="IN", help="An annotated model.")],
    output: Output,
) -> None:
    """Remove the schedule from a model."""
    from onnxsched_runtime.annotation import strip_annotation

    removed = _changed(model, output, strip_annotation)
    what = "Removed the schedule" if removed else "There was no schedule to remove"
    typer.echo(f"{what}; wrote {output}.")


@app.command()
def restore(
    model: Annotated[Path, typer.Argument(metavar="IN", help="A model that lost node keys.")],
    output: Output,
) -> None:
    """Write node keys back that another tool dropped."""
    from onnxsched_runtime.annotation import restore_annotation

    count = _changed(model, output, restore_annotation)
    typer.echo(f"Restored the keys of {count} nodes; wrote {output}.")


def _changed(source: Path, target: Path, change: Callable[[Any], _Found]) -> _Found:
    """Write a model changed; returns what the change came to."""
    from onnxsched_runtime.files import read_model, require_target, write_model

    require_target("--output", target, models=[source])
    content = read_model(source)
    with naming(source):
        found = change(content)
    write_model(content, target)
    return found


@app.command()
def doctor(json_to: Json = None) -> None:
    """Say whether models can be scheduled on this machine's GPU."""
    from onnxsched.doctor import diagnose

    require_json_target(json_to)
    found = diagnose()
    emit(json_to, found.to_json(), lambda: render.diagnosis(found))
