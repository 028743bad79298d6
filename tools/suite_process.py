"""Run an arm of the benchmark suite in processes that are killed when their time is over."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.peers import SCHEDULE_ARMS, TORCH_ARMS
from tools.suite_worker import Job

ROOT = Path(__file__).resolve().parent.parent
_CORES_A_COMPILER = 3
_LOG_LENGTH = 4000
"""Characters of a failed worker's log that are shown: compilers say much."""


@dataclass(frozen=True)
class WorkerPlace:
    """Where the workers of one configuration work, and how."""

    folder: Path
    device: str
    limit_s: float
    """How long a step may take."""
    warmup_ms: float
    iterations: int

    @property
    def source(self) -> Path:
        """The model as it was built."""
        return self.folder / "model.onnx"

    def job(self, arm: str) -> Job:
        """The job that measures an arm."""
        return Job(
            step="measure",
            arm=arm,
            source=str(self.source),
            target=str(self.folder / f"{arm}.onnx"),
            cache_dir=str(self.folder / "cache"),
            device=self.device,
            result=str(self.folder / f"{arm}.json"),
            compiled_dir=str(self.folder / f"{arm}-compiled"),
            warmup_ms=self.warmup_ms,
            iterations=self.iterations,
        )


def compile_arms(arms: Sequence[str], place: WorkerPlace) -> dict[str, dict[str, Any]]:
    """Compile those that can be at the same time; what a compiler measures, it measures alone.

    Returns:
        By arm how long that took; with `error`, a sentence, where it failed.
    """
    modes = {arm: TORCH_ARMS[arm].compile_mode for arm in arms if arm in TORCH_ARMS}
    wanted = [arm for arm, mode in modes.items() if mode and "autotune" not in mode]
    worker_count = max(1, (os.cpu_count() or 1) // _CORES_A_COMPILER)
    with ThreadPoolExecutor(worker_count) as pool:
        jobs = [dataclasses.replace(place.job(arm), step="compile") for arm in wanted]
        found = pool.map(lambda job: run_job(job, place.limit_s), jobs)
        return dict(zip(wanted, found, strict=True))


def run_arm(
    arm: str, place: WorkerPlace, compiled: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Measure an arm, after optimizing the model where it is one of ours.

    Args:
        arm: One of `ARMS`.
        place: Where.
        compiled: What `compile_arms` returned for it.

    Returns:
        What was measured; with `error`, a sentence, where something failed.
    """
    job = place.job(arm)
    if compiled is not None and "error" in compiled:
        return dict(compiled)
    if arm not in SCHEDULE_ARMS:
        return {**run_job(job, place.limit_s), **(compiled or {})}
    made = run_job(dataclasses.replace(job, step="optimize"), place.limit_s)
    return made if "error" in made else {**made, **run_job(job, place.limit_s)}


def run_job(job: Job, limit_s: float) -> dict[str, Any]:
    """The result of a worker process, or `error` where it failed or was not finished in time."""
    result, log = Path(job.result), Path(job.result).with_suffix(".log")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.suite_worker", json.dumps(dataclasses.asdict(job))]
    with log.open("w") as to:
        # Each arm compiles for itself: what another left would be missing from its seconds.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": job.compiled_dir}
        # No pipe: compilers that outlive the worker would hold it open.
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=to, stderr=to, start_new_session=True
        ) as worker:
            try:
                worker.wait(limit_s)
            except subprocess.TimeoutExpired:
                return {"error": f"The step '{job.step}' was not finished in {limit_s:g} s."}
            finally:
                _end_group(worker.pid)
    found: dict[str, Any]
    found = json.loads(result.read_text()) if result.exists() else _death(job, worker, log)
    if "error" in found:
        sys.stderr.write(log.read_text()[-_LOG_LENGTH:])
    return found


def _death(job: Job, worker: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The error of a worker that left no result."""
    last = (log.read_text().strip().splitlines() or ["no message"])[-1][:300]
    return {"error": f"The step '{job.step}' ended with code {worker.returncode} ({last})."}


def _end_group(leader: int) -> None:
    """End a worker and all that it has started: compilers keep processes of their own."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
