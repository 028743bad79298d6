"""What optimizing one model brings, step by step, for the report of a GPU host."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sample_models
from onnxsched import load, optimize
from onnxsched.comparison import Tolerances, compare
from onnxsched.inputs import random_inputs
from onnxsched.loading import Precision
from onnxsched.pipeline import OptimizeResult
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.files import read_model, write_model
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from tools.bounds import bounds_us

_LIMIT_S = 600
"""For a command: what hangs must not take the other models along."""


def measured(
    name: str, device: str, precision: Precision, budget_s: float | None, kept: Path | None
) -> Iterator[dict[str, Any]]:
    """Build, optimize and bench one model; after each step what is known by then.

    Args:
        name: Of the model, e.g. `bert`, or `googlenet@512` for larger images.
        device: One or several, as `optimize` has them.
        precision: As `optimize` has it.
        budget_s: As `optimize` has it.
        kept: Where measurements of operators are kept; None for nowhere.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "in.onnx"), Path(scratch, "out.onnx")
        kind, _, image = name.partition("@")
        write_model(sample_models.build(kind, image=int(image) if image else None), source)
        cache, other = kept or Path(scratch, "cache"), Path(scratch, "other")
        is_timed = name == "googlenet" and precision == "keep"
        command_s = time_command(source, target, device, other, budget_s) if is_timed else None
        phases = Phases()
        is_cached = cache.is_dir()
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
        found = {
            **described(optimized),
            "date": time.strftime("%Y-%m-%d"),
            "precision": precision,
            "optimize_s": optimize_s,
            "is_profile_cached": is_cached,
            "phases_s": phases.seconds(),
            "command_s": command_s,
        }
        yield found
        found["bench"] = without_samples(bench_command(source, target))
        yield found
        found["bounds"] = bounds_us(target, optimized.devices[0], cache)
        device_count = len(optimized.devices)
        found["in_processes"] = (
            distributed_command(target, device_count) if device_count > 1 else None
        )
        yield found
        found["relative_difference_in_plain_ort_on_cpu"] = difference_on_cpu(target)
        yield found


def described(optimized: OptimizeResult) -> dict[str, Any]:
    """What `optimize` says that it has made, and what else it has tried."""
    return {
        "policy": optimized.policy,
        "variant": str(optimized.variant),
        "rewrite": optimized.rewrite,
        "devices": [str(one) for one in optimized.devices],
        "streams": optimized.stream_count,
        "operators": optimized.operator_count,
        "segments": optimized.segment_count,
        "capture": optimized.capture,
        "host_operators": dict(optimized.host_reasons),
        "is_identical_to_ort": all(d.is_identical for d in optimized.differences),
        "relative_difference": max(d.relative for d in optimized.differences),
        "alternatives": [
            {k: v for k, v in entry.items() if k != "samples_us"}
            for entry in optimized.alternatives
        ],
    }


class Phases:
    """Notes what `optimize` does, and since when, and says so."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, float]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        """Be told what is being done."""
        if not self._begun or self._begun[-1][0] != what:
            self._begun.append((what, time.monotonic()))
            print(f"{self._begun[-1][1] - self._begun[0][1]:7.1f} s {what}", file=sys.stderr)

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
