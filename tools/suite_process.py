"""Run an arm of the benchmark suite in processes that are killed when their time is over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tools.peers import SCHEDULE_ARMS, TORCH_ARMS
from tools.suite_worker import Job

ROOT = Path(__file__).resolve().parent.parent
_CORES_A_COMPILER = 3
_POLL_S = 0.05
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
    budget_s: float | None
    """Of `optimize`."""

    @property
    def source(self) -> Path:
        """The model as it was built."""
        return self.folder / "model.onnx"

    def job(self, arm: str, step: Literal["optimize", "compile", "measure"]) -> Job:
        """The job that does a step of an arm."""
        return Job(
            step=step,
            arm=arm,
            source=str(self.source),
            target=str(self.folder / f"{arm}.onnx"),
            cache_dir=str(self.folder / "cache"),
            device=self.device,
            result=str(self.folder / f"{arm}-{step}.json"),
            ready=str(self.folder / f"{arm}-{step}.ready"),
            compiled_dir=str(self.folder / f"{arm}-compiled"),
            warmup_ms=self.warmup_ms,
            iterations=self.iterations,
            budget_s=self.budget_s,
        )


def compile_arms(wanted: Sequence[tuple[str, WorkerPlace]], end: float) -> None:
    """Compile those that can be at the same time; what a compiler measures, it measures alone.

    What has been compiled in the same place before is not again. How long it took, or why it
    failed, is left in the place, where `run_arms` finds it.

    Args:
        wanted: Arms and their places.
        end: Nothing is begun after this time, as `time.monotonic` tells it.
    """
    jobs = [
        (place.job(arm, "compile"), place.limit_s)
        for arm, place in wanted
        if arm in TORCH_ARMS and "autotune" not in (TORCH_ARMS[arm].compile_mode or "autotune")
    ]
    missing = [(job, limit_s) for job, limit_s in jobs if "compile_s" not in _read(job.result)]
    worker_count = max(1, (os.cpu_count() or 1) // _CORES_A_COMPILER)

    def compile_one(job: Job, limit_s: float) -> None:
        if time.monotonic() < end:
            Path(job.result).write_text(json.dumps(run_job(job, limit_s)))

    with ThreadPoolExecutor(worker_count) as pool:
        list(pool.map(lambda one: compile_one(*one), missing))


def run_arms(arms: Sequence[str], place: WorkerPlace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure arms, one after another, after optimizing the model for those of ours.

    Args:
        arms: Some of `ARMS`, whose workers load their libraries at the same time.
        place: Where.

    Yields:
        Each arm and what was measured; with `error`, a sentence, where something failed.
    """
    made = {arm: _made(arm, place) for arm in arms}
    jobs = {arm: place.job(arm, "measure") for arm in arms if "error" not in made[arm]}
    with ExitStack() as stack:
        workers = {arm: stack.enter_context(Worker(job)) for arm, job in jobs.items()}
        end = time.monotonic() + place.limit_s
        while any(w.is_preparing() for w in workers.values()) and time.monotonic() < end:
            time.sleep(_POLL_S)
        for arm in arms:
            left_s = max(0.0, end - time.monotonic())
            yield arm, {**(workers[arm].finished(left_s) if arm in workers else {}), **made[arm]}


def _made(arm: str, place: WorkerPlace) -> dict[str, Any]:
    """What making an arm took: optimizing, or compiling before."""
    if arm in SCHEDULE_ARMS:
        return run_job(place.job(arm, "optimize"), place.limit_s)
    return _read(place.job(arm, "compile").result)


def _read(result: str) -> dict[str, Any]:
    """What a step came to; empty where it was not done."""
    path = Path(result)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def run_job(job: Job, limit_s: float) -> dict[str, Any]:
    """The result of a worker process, or `error` where it failed or was not finished in time."""
    with Worker(job) as worker:
        return worker.finished(limit_s)


class Worker:
    """A process that does a job, ended with all that it has started."""

    def __init__(self, job: Job) -> None:
        """Start it."""
        self._job = job
        self._log = Path(job.result).with_suffix(".log")
        for left in (job.result, job.ready):
            Path(left).unlink(missing_ok=True)
        # Each arm compiles for itself: what another left would be missing from its seconds.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": job.compiled_dir}
        command = [sys.executable, "-m", "tools.suite_worker", json.dumps(dataclasses.asdict(job))]
        with self._log.open("w") as to:  # no pipe: compilers that outlive it would hold it open
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=to, stderr=to,
                start_new_session=True,
            )  # fmt: skip

    def is_preparing(self) -> bool:
        """Whether it runs and is not waiting for its turn."""
        return self._process.poll() is None and not Path(self._job.ready).exists()

    def finished(self, limit_s: float) -> dict[str, Any]:
        """Let it go on where it waits for its turn; what it comes to within a time limit."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which shows below
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            sys.stderr.write(self._log.read_text()[-_LOG_LENGTH:])
            return {"error": f"The step '{self._job.step}' was not finished in time."}
        finally:
            self.close()
        result = Path(self._job.result)
        found: dict[str, Any] = (
            json.loads(result.read_text()) if result.exists() else self._death()
        )
        if "error" in found:
            sys.stderr.write(self._log.read_text()[-_LOG_LENGTH:])
        return found

    def _death(self) -> dict[str, Any]:
        """The error of a worker that left no result."""
        last = (self._log.read_text().strip().splitlines() or ["no message"])[-1][:300]
        code = self._process.returncode
        return {"error": f"The step '{self._job.step}' ended with code {code} ({last})."}

    def close(self) -> None:
        """End it and all that it has started: compilers keep processes of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close() if self._process.stdin else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
