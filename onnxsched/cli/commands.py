"""The commands that run models: each parses, calls one function, and prints what came back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxsched.cli import render, say
from onnxsched.cli.app import CustomOps, Inputs, Json, Model, Output, app
from onnxsched.cli.output import emit, progress_line, require_json_target
from onnxsched_runtime.errors import NumericsError, SlowerError, UsageError, naming


@app.command()
def optimize(
    model: Annotated[Path, typer.Argument(metavar="IN", help="An ONNX model.")],
    output: Output,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda:INDEX, or several: cuda:0,cuda:1.")
    ] = "auto",
    streams: Annotated[
        int | None,
        typer.Option(help="The most streams to use on a device; 16, on the CPU up to 4."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="auto, or one of sequential, wavefront, opara, nimble, heft, hios-lp, hios-mr, "
            "ios, search."
        ),
    ] = "auto",
    schedule: Annotated[
        Path | None, typer.Option(help="A JSON file with the schedule to obey instead.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="NAME:1x3x224x224, where it is not fixed.")
    ] = None,
    inputs: Inputs = None,
    precision: Annotated[
        str, typer.Option(help="keep, or fp16 to compute in half precision.")
    ] = "keep",
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds to try schedules for; 30, more for large models."),
    ] = None,
    no_variants: Annotated[
        bool,
        typer.Option(
            "--no-variants", help="Keep ONNX Runtime's own layout, kernels and operators."
        ),
    ] = False,
    no_split: Annotated[
        bool,
        typer.Option(
            "--no-split",
            help="Neither cut operators into rows for several devices nor compute any twice.",
        ),
    ] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Where measurements are kept.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure everything now.")] = False,
    custom_ops: CustomOps = None,
    seed: Annotated[
        int, typer.Option(help="Of the inputs that outputs are checked on.", min=0)
    ] = 0,
    json_to: Json = None,
) -> None:
    """Measure a model here, schedule it, and write it annotated.

    Ctrl-C while schedules are tried keeps the best so far; a second one writes nothing.
    """
    from onnxsched.pipeline import optimize as run
    from onnxsched.shapes import parse_shapes

    libraries = custom_ops or []
    require_json_target(json_to, output, schedule, *libraries, models=[model])
    if no_cache and cache_dir is not None:
        raise UsageError("--cache-dir and --no-cache contradict each other; give one.")
    with progress_line() as progress, naming(model):
        result = run(
            model,
            output,
            device=device,
            streams=streams,
            policy=policy,
            schedule=schedule,
            shapes=parse_shapes(shape or []),
            inputs=_arrays(inputs),
            budget_s=budget,
            variants=not no_variants,
            split=not no_split,
            precision=precision,  # type: ignore[arg-type]
            cache_dir=None if no_cache else cache_dir or "",
            seed=seed,
            custom_ops=[str(path) for path in libraries],
            progress=progress,
        )
    if not no_cache and not cache_dir:
        _warn_of_no_cache()
    emit(json_to, result.to_json(), lambda: render.optimize_result(result))


def _warn_of_no_cache() -> None:
    from onnxsched.profiling.cache import default_directory, why_unusable

    if reason := why_unusable(default_directory()):
        say(
            f"Warning: '{default_directory()}' can't keep measurements ({reason}), so the next "
            "run measures again; choose a folder with --cache-dir."
        )


@app.command()
def bench(
    context: typer.Context,
    model: Model,
    against: Annotated[
        str,
        typer.Option(
            help="Arms, comma-separated: ort,ort-graph,sequential,schedule-ort; by default all "
            "but the last."
        ),
    ] = "",
    original: Annotated[
        Path | None, typer.Option(help="The model before optimize, for the plain ORT arms.")
    ] = None,
    inputs: Inputs = None,
    warmup: Annotated[float, typer.Option(help="Milliseconds before measuring, an arm.")] = 200.0,
    duration: Annotated[float, typer.Option(help="Seconds to measure, at least.")] = 3.0,
    iterations: Annotated[int, typer.Option(help="Samples of each arm, at least.", min=1)] = 100,
    custom_ops: CustomOps = None,
    fail_under: Annotated[
        float | None, typer.Option(help="Exit 6 if less than this many times faster than ORT.")
    ] = None,
    throughput: Annotated[
        bool, typer.Option(help="Instead: requests a second, with more and more in flight.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Measure the schedule beside plain ONNX Runtime, in turns."""
    from onnxsched.benchmark import bench as run

    require_json_target(json_to, *(custom_ops or []), models=[model, original])
    if throughput:
        _require_throughput_alone(context)
        _bench_throughput(model, duration, inputs, custom_ops, json_to)
        return
    if fail_under is not None and not fail_under >= 0:
        raise UsageError(f"--fail-under {fail_under} is no ratio; give a number, at least 0.")
    with progress_line() as progress, naming(model):
        result = run(
            model,
            against=[name.strip() for name in against.split(",") if name.strip()],
            original=original,
            inputs=_arrays(inputs),
            warmup_ms=warmup,
            duration_s=duration,
            iterations=iterations,
            custom_ops=[str(path) for path in custom_ops or []],
            progress=progress,
        )
    emit(json_to, result.to_json(), lambda: render.bench_result(result))
    reached = result.ratio_to(result.rival).value
    if fail_under is not None and reached < fail_under:
        raise SlowerError(
            f"'{model}' is {reached:.2f} times as fast as {result.rival}, below the "
            f"{fail_under:g} that --fail-under asks for."
        )


def _require_throughput_alone(context: typer.Context) -> None:
    """Refuse options that would have no effect, also where they give what is the default."""
    for name in ("against", "original", "warmup", "iterations", "fail_under"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"--throughput and {option} contradict each other; give one.")


def _bench_throughput(
    model: Path,
    duration_s: float,
    inputs: list[str] | None,
    custom_ops: list[Path] | None,
    json_to: str | None,
) -> None:
    from onnxsched.throughput import ARMS, COPIES, measure_throughput

    with progress_line() as progress, naming(model):
        served = measure_throughput(
            model,
            duration_s=duration_s / (len(COPIES) * len(ARMS)),
            inputs=_arrays(inputs),
            custom_ops=[str(path) for path in custom_ops or []],
            progress=progress,
        )
    emit(json_to, served.to_json(), lambda: render.throughput_result(served))


@app.command(name="run")
def run_model(
    model: Model,
    inputs: Inputs = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="A folder for the outputs, one .npy each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.", min=0)] = 0,
    custom_ops: CustomOps = None,
) -> None:
    """Run the schedule once."""
    from onnxsched.running import run_files
    from onnxsched_runtime.arrays import input_files

    with naming(model):
        outputs = run_files(
            model,
            input_files(inputs or []),
            output_dir,
            seed=seed,
            custom_ops=[str(path) for path in custom_ops or []],
        )
    render.run_outputs(outputs)


def _arrays(texts: list[str] | None) -> dict[str, Any]:
    """The arrays in the files of `NAME=FILE.npy` options."""
    from onnxsched_runtime.arrays import input_files, read_array

    return {name: read_array(name, file) for name, file in input_files(texts or []).items()}


@app.command()
def verify(
    actual: Annotated[Path, typer.Argument(metavar="A", help="The model in question.")],
    expected: Annotated[Path, typer.Argument(metavar="B", help="The model that is right.")],
    rtol: Annotated[list[str] | None, typer.Option(help="[NAME:]X, relative.")] = None,
    atol: Annotated[list[str] | None, typer.Option(help="[NAME:]X, absolute.")] = None,
    runs: Annotated[int, typer.Option(help="How many different inputs.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Of the first input.", min=0)] = 0,
    inputs: Inputs = None,
    device: Annotated[str, typer.Option(help="Where models without a schedule run.")] = "auto",
    custom_ops: CustomOps = None,
    json_to: Json = None,
) -> None:
    """Compare what two models compute, scheduled or plain."""
    from onnxsched.comparison import Tolerances
    from onnxsched.verify import verify as run

    require_json_target(json_to, *(custom_ops or []), models=[actual, expected])
    relative, relative_of = _tolerances("--rtol", rtol or [])
    absolute, absolute_of = _tolerances("--atol", atol or [])
    tolerances = Tolerances(
        1e-3 if relative is None else relative, absolute, relative_of, absolute_of
    )
    found = run(
        actual,
        expected,
        tolerances=tolerances,
        run_count=runs,
        seed=seed,
        inputs=_arrays(inputs),
        device=device,
        custom_ops=[str(path) for path in custom_ops or []],
    )
    content: dict[str, Any] = {
        "schema_version": 1,
        "outputs": [dataclasses.asdict(difference) for difference in found],
    }
    emit(json_to, content, lambda: render.differences(found))
    if wrong := [d for d in found if not d.is_within]:
        raise NumericsError(
            f"Output '{wrong[0].output}' of '{actual}' differs from '{expected}' by "
            f"{wrong[0].max_absolute:.3g}, more than the tolerance; loosen --rtol if that is fine."
        )


def _tolerances(option: str, texts: list[str]) -> tuple[float | None, dict[str, float]]:
    """Read `[NAME:]X` options: the one for all outputs, and those by name."""
    common, named = None, {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not value >= 0:
            raise UsageError(f"{option} {text} can't be read: write [NAME:]X, X not negative.")
        if name:
            named[name] = value
        else:
            common = value
    return common, named
