"""One step of the benchmark suite in a process of its own, so that it can be killed and sized.

    python -m tools.suite_worker JOB      # a JSON object with the fields of `Job`

A step optimizes a model, compiles one arm, or measures one beside the reference arm.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from onnxsched import optimize
from onnxsched.comparison import Tolerances, difference
from onnxsched.environment import describe_environment
from onnxsched.inputs import random_inputs
from onnxsched.loading import Model, load_model
from onnxsched.pipeline import OptimizeResult
from onnxsched.summary import ratio, summarize
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import NumericsError, OnnxschedError
from onnxsched_runtime.execution import multiplies_matrices
from onnxsched_runtime.files import read_model, written_whole
from tools.bounds import bounds_us
from tools.peers import SCHEDULE_ARMS, Arm, ExecutorArm, open_arm, reference_arm, time_arm_us

_ROUND_COUNT = 5
_RELATIVE = 1e-2
"""The farthest that outputs may be apart: TF32 makes 1e-3 of it, a wrong peer far more."""


@dataclass(frozen=True)
class Job:
    """What a worker is asked for."""

    step: Literal["optimize", "compile", "measure"]
    arm: str
    """One of `ARMS`; to optimize, a policy or `auto`."""
    source: str
    """The model as it was built."""
    target: str
    """The annotated model of an arm of ours."""
    cache_dir: str
    device: str
    result: str
    """Where the JSON goes."""
    ready: str
    """The file that says that only measuring is left."""
    warmup_ms: float = 100.0
    iterations: int = 100
    """Samples an arm."""
    compiled_dir: str = ""
    """Where a compiler keeps what it made, for the next step."""
    budget_s: float | None = None
    """Of `optimize`."""


def main() -> None:
    """Do the job of the command line, and end at once: taking CUDA apart only costs time."""
    job = _asked(sys.argv[1:])
    threading.Thread(target=_listen, daemon=True).start()
    try:
        content = {"optimize": optimized, "compile": compiled, "measure": measured}[job.step](job)
    except Exception as error:  # a peer may fail in any way: the suite goes on and says so
        if not isinstance(error, OnnxschedError):
            traceback.print_exc()
        content = {"error": one_sentence(error)}
    with written_whole(job.result) as draft:
        draft.write_text(json.dumps(content))
    sys.stderr.flush()
    os._exit(0)


def _asked(arguments: list[str]) -> Job:
    """The job of the command line; who asks for none is told what there is to ask for."""
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        sys.exit()
    try:
        (text,) = arguments
        return Job(**json.loads(text))
    except (TypeError, ValueError):
        print("The argument is no job; tools/suite.py starts workers with one.", file=sys.stderr)
        sys.exit(2)


def one_sentence(error: BaseException) -> str:
    """The first line of what went wrong, with its kind where that is not ours."""
    line = (str(error).strip() or "no message").splitlines()[0][:300]
    return line if isinstance(error, OnnxschedError) else f"{type(error).__name__}: {line}"


def optimized(job: Job) -> dict[str, Any]:
    """Schedule the model by one policy, or by all of them, and say what that took."""
    is_profiled = Path(job.cache_dir).is_dir()
    start = time.monotonic()
    result = optimize(
        job.source,
        job.target,
        device=job.device,
        policy=job.arm,
        cache_dir=job.cache_dir,
        budget_s=job.budget_s,
    )
    return {
        "optimize_s": time.monotonic() - start,
        "is_profile_cached": is_profiled,
        "policy": result.policy,
        "streams": result.stream_count,
        "segments": result.segment_count,
        "predicted_us": _predicted_us(result),
        "alternatives": [
            {key: value for key, value in entry.items() if key != "samples_us"}
            for entry in result.alternatives
        ],
        **bounds_us(Path(job.target), Device.parse(job.device), Path(job.cache_dir)),
    }


def _predicted_us(result: OptimizeResult) -> float | None:
    """What the simulator said of the schedule that was chosen."""
    chosen = (result.policy, result.stream_count, result.measured_us)
    return next(
        (
            float(entry["predicted_us"])
            for entry in result.alternatives
            if (entry["policy"], entry["streams"], entry["measured_us"]) == chosen
        ),
        None,
    )


def compiled(job: Job) -> dict[str, Any]:
    """Compile an arm and leave what the compiler keeps; takes no time that counts on the GPU."""
    device = Device.parse(job.device)
    model = load_model(job.source, device)
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    with open_arm(job.arm, model, device, feeds) as arm:
        return {"compile_s": arm.compile_s}


def measured(job: Job) -> dict[str, Any]:
    """Measure an arm and the reference in interleaved rounds, once it is this worker's turn."""
    device = Device.parse(job.device)
    if device.kind == "cuda" and job.arm in SCHEDULE_ARMS:
        _keep_workspace(Path(job.target))
    model = load_model(job.source, device)
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    _await_turn(job)
    with cuda.other_contexts([device]):
        return {
            **_timed(job, model, device, feeds),
            "environment": {**describe_environment(device), "torch": torch.__version__},
        }


def _timed(
    job: Job, model: Model, device: Device, feeds: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What an arm takes, beside the reference."""
    free_nbytes = _free_nbytes(device)
    start = time.monotonic()
    with open_arm(job.arm, model, device, feeds, Path(job.target)) as arm:
        prepare_s = time.monotonic() - start
        _free_nbytes(device)  # what making it took and running it does not need is given back
        _warm_up(arm, job.warmup_ms)
        memory_nbytes = free_nbytes - _free_nbytes(device, give_back=False)
        with open_arm(reference_arm(device), model, device, feeds) as reference:
            _warm_up(reference, job.warmup_ms)
            relative = _relative_difference(model, arm, reference)
            times_us, reference_us = _interleaved(arm, reference, job.iterations)
    return {
        "time": dataclasses.asdict(summarize([s for r in times_us for s in r])),
        "reference": dataclasses.asdict(summarize([s for r in reference_us for s in r])),
        "ratio": dataclasses.asdict(ratio(reference_us, times_us)),
        "memory_nbytes": memory_nbytes if device.kind == "cuda" else None,
        "prepare_s": prepare_s,
        "compile_s": arm.compile_s,
        "variant": str(arm.variant) if isinstance(arm, ExecutorArm) and arm.variant else None,
        "relative_difference": relative,
    }


def _keep_workspace(schedule: Path) -> None:
    """Let a schedule have the first say on cuBLAS's memory, as where nothing else is loaded."""
    model = read_model(schedule)
    is_full = multiplies_matrices(model, read_annotation(model).tensors)
    cuda.keep_blas_workspace("full" if is_full else "small")


_turn = threading.Event()


def _listen() -> None:
    """Be told when it is this worker's turn; with the suite, end all that it has started."""
    if sys.stdin.readline():
        _turn.set()
        sys.stdin.readline()
    os.killpg(0, signal.SIGKILL)


def _await_turn(job: Job) -> None:
    """Say that all is loaded, and wait: nobody else works on the GPU then.

    Libraries choose kernels by timing them, so not even making an arm goes with another's.
    """
    Path(job.ready).touch()
    _turn.wait()


def _free_nbytes(device: Device, give_back: bool = True) -> int:
    """Free memory of the whole device, without what torch only keeps; 0 on the CPU."""
    if device.kind == "cpu":
        return 0
    torch.zeros(1, device=str(device))  # so that making the context is nobody's memory
    torch.cuda.synchronize(device.index)
    if give_back:
        gc.collect()
        torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device.index)[0])


def _warm_up(arm: Arm, warmup_ms: float) -> None:
    end = time.monotonic() + warmup_ms / 1e3
    time_arm_us(arm, 1)
    while time.monotonic() < end:
        time_arm_us(arm, 1)


def _interleaved(
    arm: Arm, reference: Arm, iterations: int
) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Samples of both, one tuple a round."""
    count = max(1, -(-iterations // _ROUND_COUNT))
    rounds = [
        (time_arm_us(arm, count), time_arm_us(reference, count)) for _ in range(_ROUND_COUNT)
    ]
    return [first for first, _ in rounds], [second for _, second in rounds]


def _relative_difference(model: Model, arm: Arm, reference: Arm) -> float:
    """How far an arm's outputs are from the reference's: the norm, at worst over the outputs.

    Raises:
        NumericsError: So far that it computes something else.
    """
    names = [value.name for value in model.baseline.graph.output]
    worst = 0.0
    for name, a, b in zip(names, arm.outputs(), reference.outputs(), strict=True):
        found = difference(name, a, b, Tolerances(_RELATIVE)).relative
        worst = max(worst, found)
        if not found <= _RELATIVE:
            raise NumericsError(
                f"Output '{name}' differs from ONNX Runtime's by {found:.3g} of its norm, so its "
                "time was not taken; please report the model."
            )
    return worst


if __name__ == "__main__":
    main()
