"""What each process does: join the others, load its part, run it, and report on rank 0."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from onnxsched_runtime.arguments import zeros
from onnxsched_runtime.arrays import input_files, read_array, write_arrays
from onnxsched_runtime.distributed.ending import end_with_the_others, raise_when_interrupted
from onnxsched_runtime.errors import OnnxschedError, UsageError, naming
from onnxsched_runtime.executors.ranks import RankExecutor
from onnxsched_runtime.files import require_target, written_whole
from onnxsched_runtime.group import (
    heard_by_others,
    joined_process_group,
    leave_process_group,
    require_timeout,
)
from onnxsched_runtime.load import Session, load
from onnxsched_runtime.printing import unwritten

_WARM_UP_COUNT = 10


def obey(arguments: Sequence[str], held: list[RankExecutor]) -> None:
    """Run as one process of several.

    Args:
        arguments: Of the command line.
        held: Filled with what it runs, once that is loaded.

    Raises:
        OnnxschedError: What this process can't do, or why all must end.
    """
    options = _parsed(arguments)
    result = None
    group = joined_process_group(options.timeout)
    raise_when_interrupted()
    with (
        naming(options.model),
        heard_by_others(),
        load(options.model, process_group=group, timeout_s=options.timeout) as session,
    ):
        executor = session.executor
        assert isinstance(executor, RankExecutor)
        held.append(executor)
        end_with_the_others(executor)
        with executor.telling():
            if executor.rank == 0:
                result = _run(session, options)
            else:
                _assist(session, options)
    leave_process_group()
    if result is not None:
        _report(result, options.json)


class _Parser(argparse.ArgumentParser):
    """A parser that ends in one sentence, and prints help where that can fail."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; `--help` says more.")

    def print_help(self, file: object = None) -> None:
        _print(self.format_help().rstrip())


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="onnxsched_runtime.distributed", description="Run a schedule in several processes."
    )
    parser.add_argument("model", help="an annotated model, the same for all processes")
    parser.add_argument(
        "--input", action="append", default=[], help="NAME=FILE.npy; zeros where not given"
    )
    parser.add_argument("--output-dir", type=Path, help="a folder for the outputs, one .npy each")
    parser.add_argument(
        "--bench", type=int, nargs="?", const=100, default=0, metavar="RUNS",
        help="time this many runs, 100 if not said",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the result there; - for stdout")
    parser.add_argument(
        "--timeout", type=float, default=20.0, metavar="SECONDS",
        help="how long a process may be silent, or take for one step (%(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse before anything runs what can't end well."""
    require_timeout("--timeout", options.timeout)
    if options.bench < 0:
        raise UsageError(f"--bench {options.bench} is too few; give at least 0.")
    is_writer = os.environ.get("RANK", "0") == "0"  # others may be on hosts without the folder
    if is_writer and options.json not in (None, "-"):
        inputs = [text.partition("=")[2] for text in options.input]
        require_target("--json", options.json, options.model, *inputs, models=[options.model])


def _run(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 does; returns what it reports."""
    feeds = _feeds(session, options.input)
    outputs = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    if options.output_dir is not None:
        write_arrays(outputs, options.output_dir)
    latency_us = []
    for _ in range(_run_count(options) - 1):
        start_s = time.perf_counter()
        session.run(None, feeds)
        latency_us.append((time.perf_counter() - start_s) * 1e6)
    executor = session.executor
    assert isinstance(executor, RankExecutor)
    return {
        "schema_version": 1,
        "model": Path(options.model).name,
        "ranks": {str(device): rank for device, rank in executor.rank_of.items()},
        "capture": executor.capture,
        "outputs": {name: _described(value) for name, value in outputs.items()},
        "latency_us": [round(sample, 1) for sample in latency_us[_WARM_UP_COUNT:]],
    }


def _assist(session: Session, options: argparse.Namespace) -> None:
    """What all other ranks do: run as often."""
    for _ in range(_run_count(options)):
        session.run(None, {})


def _run_count(options: argparse.Namespace) -> int:
    return 1 + (_WARM_UP_COUNT + options.bench if options.bench else 0)


def _feeds(session: Session, named: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: read_array(name, file) for name, file in input_files(named).items()}
    drawn = {a.name: zeros(a) for a in session.get_inputs() if a.name not in given}
    return {**drawn, **given}


def _described(value: Any) -> Any:
    if isinstance(value, list):
        return [_described(element) for element in value]
    if value is None or isinstance(value, dict):
        return "nothing" if value is None else f"map[{len(value)}]"
    value = np.asarray(value)
    return f"{value.dtype}{list(value.shape)}"


def _report(result: Mapping[str, Any], target: str | None) -> None:
    if target == "-":
        _print(json.dumps(result, indent=1))
        return
    if target is not None:
        with written_whole(target) as draft:
            draft.write_text(json.dumps(result, indent=1) + "\n")
    count = len(set(result["ranks"].values()))
    lines = [f"{name}: {value}" for name, value in result["outputs"].items()]
    if samples := result["latency_us"]:
        median_us = statistics.median(samples)
        lines.append(f"{median_us:.0f} us, the median of {len(samples)} runs in {count} processes")
    _print("\n".join(lines))


def _print(text: str) -> None:
    """Print at once, as stdout may be full, or its reader gone.

    Raises:
        OnnxschedError: It is.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        raise OnnxschedError(unwritten(error)) from error
