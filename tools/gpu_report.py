"""Run the GPU tests and the benchmark of the zoo on a GPU host, and print one short table.

    python tools/gpu_report.py --out RESULTS_DIR [--models googlenet,bert] [--no-tests]
    python tools/gpu_report.py --out RESULTS_DIR --device cuda:0,cuda:1 --models inception_v3@2048

Everything is measured in one process tree on one machine: for each model an `optimize`, cold
unless there is a `--cache` already, then plain ONNX Runtime on the model as it was built, its own
CUDA graph, one stream, and the schedule, in interleaved rounds. `RESULTS_DIR/zoo.json` holds the
numbers and the environment, as far as they are known whenever it ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import sample_models
from onnxsched.environment import describe_environment
from onnxsched.loading import Precision
from onnxsched_runtime.device import Device
from tools.gpu_measure import measured

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("ort", "ort-graph", "sequential")


def main() -> None:
    """Parse, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--models",
        default=",".join(sample_models.MODELS),
        help="comma-separated, e.g. bert or googlenet@512 for larger images",
    )
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--half", default="", help="models to measure in float16 as well")
    parser.add_argument("--budget", type=float, help="seconds a model; as optimize has it")
    parser.add_argument("--device", default="cuda:0", help="where to measure; several by commas")
    parser.add_argument("--cache", type=Path, help="keep measurements of operators there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tests = "not run" if arguments.no_tests else run_tests(arguments.out)
    print(f"tests/gpu: {tests}", flush=True)
    if "failed" in tests:
        sys.exit("Not measuring a build whose tests fail; see the logs.")
    environment = describe_environment(Device.parse(arguments.device.partition(",")[0]))
    results: dict[str, Any] = {}
    print(f"{'model':20}{'schedule':>24}{'us':>9}" + "".join(f"{arm:>14}" for arm in ARMS))
    jobs: list[tuple[str, Precision]] = [(name, "keep") for name in arguments.models.split(",")]
    jobs += [(name, "fp16") for name in filter(None, arguments.half.split(","))]
    for name, precision in jobs:
        if name in ("", "tiny"):
            continue
        title = name if precision == "keep" else f"{name}/{precision}"
        try:
            steps = measured(name, arguments.device, precision, arguments.budget, arguments.cache)
            for found in steps:
                results[title] = found
                write_report(arguments.out / "zoo.json", tests, environment, results)
        except Exception as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
            results[title] = {**results.get(title, {}), "error": failure}
            write_report(arguments.out / "zoo.json", tests, environment, results)
        print(line(title, results[title]), flush=True)


def run_tests(out: Path) -> str:
    """Run tests/gpu; returns pytest's last lines, and leaves the logs in `out`.

    Side by side where pytest-xdist is there, except for tests that need the device alone.
    """
    count = min(12, 3 * (os.cpu_count() or 1) // 4)
    is_parallel = importlib.util.find_spec("xdist") is not None
    workers = ["-n", str(count), "--dist", "worksteal"] if is_parallel else []
    options = ["-v", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "--durations=10"]
    ends = []
    for name, chosen in (("together", [*workers, "-m", "not alone"]), ("alone", ["-m", "alone"])):
        command = [sys.executable, "-m", "pytest", *options, *chosen, str(ROOT / "tests" / "gpu")]
        log = out / f"tests-{name}.log"
        with log.open("w") as to:  # so that it tells how far they came, whatever ends them
            done = subprocess.run(command, cwd=ROOT, stdout=to, stderr=to, check=False)
        last = (log.read_text().strip().splitlines() or ["no output"])[-1].strip("= ")
        ends.append(last if done.returncode == 0 else f"failed ({done.returncode}): {last}")
    return "; ".join(ends)


def write_report(
    path: Path, tests: str, environment: dict[str, Any], results: dict[str, Any]
) -> None:
    """Write what there is so far, so that a time limit does not lose it."""
    report = {
        "schema_version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment,
        "tests": tests,
        "models": results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def line(name: str, result: dict[str, Any]) -> str:
    """Time of the schedule in microseconds, and how many times faster it is than each arm."""
    if "error" in result:
        return f"{name:20}{result['error'][:80]}"
    ratios, arms = result["bench"]["ratios"], result["bench"]["arms"]
    cells = [f"{ratios[arm]['value']:.2f}x" if arm in ratios else "" for arm in ARMS]
    device = arms["schedule"]["device"] or arms["schedule"]["latency"]
    rewrite = "" if result["rewrite"] == "none" else f" {result['rewrite']}"
    chosen = f"{result['policy']}/{result['streams']} {result['variant']}{rewrite}"
    identical = "" if result["is_identical_to_ort"] else f"{result['relative_difference']:.0e}"
    return (
        f"{name:20}{chosen:>24}{device['median_us']:9.1f}"
        + "".join(f"{cell:>14}" for cell in cells)
        + f"  {result['optimize_s']:.0f}s {result['command_s'] or ''} {identical}"
        + f" {memory_ratio(arms):.2f}x memory"
    )


def memory_ratio(arms: dict[str, Any]) -> float:
    """Device memory of the schedule over that of plain ORT."""
    held = [arms[name]["memory_nbytes"] or 0 for name in ("schedule", "ort")]
    return held[0] / held[1] if held[1] else float("nan")


if __name__ == "__main__":
    main()
