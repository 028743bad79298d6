"""Run the GPU tests and the benchmark of the zoo on a GPU host, and print one short table.

    python tools/gpu_report.py --out RESULTS_DIR [--models googlenet,bert] [--no-tests]
    python tools/gpu_report.py --out RESULTS_DIR --device cuda:0,cuda:1 --models inception_v3@2048

Everything is measured in one process tree on one machine: for each model a cold `optimize`, then
plain ONNX Runtime on the model as it was built, its own CUDA graph, one stream, and the schedule,
in interleaved rounds. `RESULTS_DIR/zoo.json` holds the numbers and the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import sample_models
from onnxsched import load, optimize
from onnxsched.comparison import Tolerances, compare
from onnxsched.environment import describe_environment
from onnxsched.inputs import random_inputs
from onnxsched.loading import Precision
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.files import read_model, write_model
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from tools.bounds import bounds_us

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 600
"""For a command: what hangs must not take the other models along."""
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
            results[title] = measure_model(name, arguments.device, precision, arguments.budget)
        except Exception as error:
            traceback.print_exc()
            results[title] = {"error": f"{type(error).__name__}: {error}"}
        write_report(arguments.out / "zoo.json", tests, environment, results)
        print(line(title, results[title]), flush=True)


def run_tests(out: Path) -> str:
    """Run tests/gpu; returns pytest's last lines, and leaves the logs in `out`.

    Side by side where pytest-xdist is there, except for tests that need the device alone.
    """
    workers = ["-n", "4", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    options = ["-q", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "--durations=10"]
    ends = []
    for name, chosen in (("together", [*workers, "-m", "not alone"]), ("alone", ["-m", "alone"])):
        command = [sys.executable, "-m", "pytest", *options, *chosen, str(ROOT / "tests" / "gpu")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        (out / f"tests-{name}.log").write_text(done.stdout + done.stderr)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        ends.append(last if done.returncode == 0 else f"failed ({done.returncode}): {last}")
    return "; ".join(ends)


def measure_model(
    name: str, device: str, precision: Precision, budget_s: float | None
) -> dict[str, Any]:
    """Build, optimize without a cache, and bench one model."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "in.onnx"), Path(scratch, "out.onnx")
        kind, _, image = name.partition("@")
        write_model(sample_models.build(kind, image=int(image) if image else None), source)
        cache, other = Path(scratch, "cache"), Path(scratch, "other")
        is_timed = name == "googlenet" and precision == "keep"
        command_s = time_command(source, target, device, other, budget_s) if is_timed else None
        phases = Phases()
        optimized, optimize_s = timed(
            lambda: optimize(
                source,
                target,
                device=device,
                cache_dir=cache,
                budget_s=budget_s,
                precision=precision,
                progress=phases,
            )
        )
        seconds = phases.seconds()
        measured = bench_command(source, target)
        device_count = len(optimized.devices)
        in_processes = distributed_command(target, device_count) if device_count > 1 else None
        on_cpu = difference_on_cpu(target)
        bounds = bounds_us(target, optimized.devices[0], cache)
    return {
        "policy": optimized.policy,
        "variant": str(optimized.variant),
        "rewrite": optimized.rewrite,
        "precision": precision,
        "devices": [str(one) for one in optimized.devices],
        "streams": optimized.stream_count,
        "operators": optimized.operator_count,
        "segments": optimized.segment_count,
        "capture": optimized.capture,
        "host_operators": dict(optimized.host_reasons),
        "optimize_s": optimize_s,
        "phases_s": seconds,
        "command_s": command_s,
        "is_identical_to_ort": all(d.is_identical for d in optimized.differences),
        "relative_difference": max(d.relative for d in optimized.differences),
        "relative_difference_in_plain_ort_on_cpu": on_cpu,
        "alternatives": [
            {k: v for k, v in entry.items() if k != "samples_us"}
            for entry in optimized.alternatives
        ],
        "bounds": bounds,
        "bench": without_samples(measured),
        "in_processes": in_processes,
    }


class Phases:
    """Notes what `optimize` does, and since when."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, float]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        """Be told what is being done."""
        if not self._begun or self._begun[-1][0] != what:
            self._begun.append((what, time.monotonic()))

    def seconds(self) -> dict[str, float]:
        """How long each took in all, up to now."""
        found: dict[str, float] = {}
        ends = [*(start for _, start in self._begun[1:]), time.monotonic()]
        for (what, start), end in zip(self._begun, ends, strict=True):
            found[what] = round(found.get(what, 0.0) + end - start, 2)
        return found


def difference_on_cpu(path: Path) -> float:
    """How far plain ORT on the CPU is from the schedule, on the annotated file as it is."""
    model = read_model(path)
    annotation = read_annotation(model)
    feeds = random_inputs(model, annotation.tensors, seed=0)
    outputs = [value.name for value in model.graph.output]
    settings = SessionSettings(Device("cpu"))
    with load(path) as session, OrtSession(path, settings) as plain:
        found = compare(
            lambda feed: session.run(outputs, feed),
            lambda feed: plain.run(feed, outputs),
            outputs,
            [feeds],
            Tolerances(),
        )
    return max(difference.relative for difference in found)


def timed(work: Any) -> tuple[Any, float]:
    """What `work` returns, and how many seconds it took."""
    start = time.monotonic()
    return work(), time.monotonic() - start


def time_command(
    source: Path, target: Path, device: str, cache: Path, budget_s: float | None
) -> dict[str, float]:
    """Seconds of the whole command in a fresh process: with an empty cache, then a full one."""
    command = [sys.executable, "-m", "onnxsched", "optimize", str(source), "-o", str(target),
               "--device", device, "--cache-dir", str(cache)]  # fmt: skip
    command += [] if budget_s is None else ["--budget", str(budget_s)]

    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_LIMIT_S)

    return {"cold": timed(run)[1], "cached": timed(run)[1]}


def bench_command(source: Path, target: Path) -> dict[str, Any]:
    """What `bench` finds in a fresh process: what one holds depends on what it ran before."""
    found = target.with_suffix(".json")
    command = [sys.executable, "-m", "onnxsched", "bench", str(target), "--original", str(source),
               "--duration", "0.5", "--iterations", "60", "--warmup", "50",
               "--json", str(found)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_LIMIT_S)
    return dict(json.loads(found.read_text()))


def distributed_command(target: Path, count: int) -> dict[str, Any]:
    """What a whole run of the schedule takes in so many processes, one for each GPU."""
    found = target.with_name("distributed.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
               "-m", "onnxsched_runtime.distributed", str(target), "--bench",
               "--json", str(found)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("onnxsched: ")]
        return {"error": said[0] if said else done.stderr[-300:]}
    result = json.loads(found.read_text())
    latency_us = statistics.median(result["latency_us"])
    return {"capture": result["capture"], "ranks": result["ranks"], "latency_us": latency_us}


def without_samples(result: dict[str, Any]) -> dict[str, Any]:
    """Summaries only: the samples of a whole zoo are too many to commit."""
    del result["environment"]
    for arm in result["arms"].values():
        del arm["device_us"], arm["latency_us"]
    return result


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
