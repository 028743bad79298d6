"""The application that commands are added to, and the options that several have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxsched_runtime.errors import UsageError

app = typer.Typer(
    help="Schedule the operators of an ONNX model over CUDA streams, and run the schedule.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _refuse_stdout(output: Path) -> Path:
    if str(output) == "-":
        raise UsageError("--output - is no file, and stdout takes no models; give a path.")
    return output


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A model written by optimize.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Where to write the model.", callback=_refuse_stdout),
]
Json = Annotated[str | None, typer.Option("--json", help="Write JSON to a file, or - for stdout.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="NAME=FILE.npy; random where not given.")
]
CustomOps = Annotated[
    list[Path] | None, typer.Option("--custom-ops", help="A library of custom operators.")
]


def _show_version(asked: bool) -> None:
    if asked:
        from onnxsched_runtime.version import own_version

        typer.echo(own_version())
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Schedule the operators of an ONNX model over CUDA streams, and run the schedule."""
