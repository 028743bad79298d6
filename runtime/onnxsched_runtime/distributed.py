"""`torchrun --nproc-per-node N -m onnxsched_runtime.distributed MODEL`: one schedule, N processes.

Rank 0 has the inputs, the outputs and the result; the others only say what goes wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsched_runtime.arguments import zeros
from onnxsched_runtime.arrays import input_files, read_array, write_arrays
from onnxsched_runtime.errors import OnnxschedError, UsageError, unforeseen
from onnxsched_runtime.executors.ranks import RankExecutor
from onnxsched_runtime.files import require_target, written_whole
from onnxsched_runtime.group import joined_process_group, leave_process_group, require_timeout
from onnxsched_runtime.load import Session, load

_GRACE_S = 2.0
"""For a process to end by itself when all must; then it is ended."""
_POLL_S = 0.02
_WARM_UP_COUNT = 10
_voice = threading.Lock()
"""Whoever takes it says why this process ends; nobody gives it back."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as one process of several; returns the exit code."""
    result = None
    held: list[RankExecutor] = []
    try:
        options = _parsed(arguments)
        _end_when_asked(held)
        group = joined_process_group(options.timeout)
        with load(options.model, process_group=group, timeout_s=options.timeout) as session:
            executor = session.executor
            assert isinstance(executor, RankExecutor)
            held.append(executor)
            _end_with_the_others(executor)
            with executor.telling():
                if executor.rank == 0:
                    result = _run(session, options)
                else:
                    _assist(session, options)
        leave_process_group()
        if result is not None:
            _report(result, options.json)
            print(end="", flush=True)  # stdout may be full, or closed
    except OnnxschedError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 130
    except Exception as error:
        _say(unforeseen(error))
        return 1
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
        print(json.dumps(result, indent=1))
        return
    if target is not None:
        with written_whole(target) as draft:
            draft.write_text(json.dumps(result, indent=1) + "\n")
    count = len(set(result["ranks"].values()))
    for name, value in result["outputs"].items():
        print(f"{name}: {value}")
    if samples := result["latency_us"]:
        median_us = statistics.median(samples)
        print(f"{median_us:.0f} us, the median of {len(samples)} runs in {count} processes")


def _end_when_asked(held: Sequence[RankExecutor]) -> None:
    """End this process soon after a SIGTERM, with the reason if there is one by then.

    A launcher that sees one process end asks the others to at once, mostly before they have found
    out why.

    Args:
        held: What it runs, once that is loaded.
    """

    def find_out() -> None:
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end and not any(executor.failed.is_set() for executor in held):
            time.sleep(_POLL_S)
        rank = os.environ.get("RANK", "0")
        when = "" if held else " while it loaded the model; another may have ended"
        _end(held, f"Rank {rank} was asked to end (SIGTERM){when}.")

    def asked(*_: object) -> None:
        threading.Thread(target=find_out, daemon=True).start()

    signal.signal(signal.SIGTERM, asked)


def _end_with_the_others(executor: RankExecutor) -> None:
    """End this process when all must, even in the middle of what can't be interrupted."""

    def watch() -> None:
        executor.failed.wait()
        time.sleep(_GRACE_S)
        _end([executor], "All processes must end.")

    threading.Thread(target=watch, daemon=True).start()


def _end(held: Sequence[RankExecutor], sentence: str) -> None:
    verdicts = [executor.verdict for executor in held if executor.verdict]
    _say(verdicts[0] if verdicts else sentence)
    sys.stdout.flush()
    os._exit(1)


def _say(sentence: str) -> None:
    if _voice.acquire(blocking=False):
        print(f"onnxsched: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_code = main()
    if exit_code:  # else a launcher's SIGTERM, or a thread that is stuck, might have its way
        os._exit(exit_code)
