"""Measure a scheduled model beside plain ONNX Runtime, all timed the same way."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxsched.arms import ARMS, SCHEDULE, arm_names, baseline_of, needed_by_ort_graph, open_arm
from onnxsched.environment import describe_environment, pairs_through_host
from onnxsched.inputs import random_blamed, random_inputs
from onnxsched.racing import require_time, time_runs_us
from onnxsched.summary import Ratio, Summary, ratio, summarize
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.execution import Executor, lowered_source
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.files import read_model

_ROUND_COUNT = 20


@dataclass(frozen=True)
class Arm:
    """One way to run the model, measured."""

    name: str
    capture: str
    refusal: str | None
    """Why it is not captured as its name says; None where it is."""
    device_us: tuple[tuple[float, ...], ...]
    """Time between events on the device, one tuple a round; empty where part of the model runs
    on the host, and on the CPU."""
    latency_us: tuple[tuple[float, ...], ...]
    """Time of a call that takes and returns host arrays, one tuple a round."""
    memory_nbytes: int | None
    """What it holds on all devices once it has run, libraries not counted; None on the CPU."""

    @property
    def device(self) -> Summary | None:
        """The distribution of device times."""
        return summarize(np.concatenate(self.device_us).tolist()) if self.device_us else None

    @property
    def latency(self) -> Summary:
        """The distribution of latencies."""
        return summarize(np.concatenate(self.latency_us).tolist())


@dataclass(frozen=True)
class BenchResult:
    """Every arm, measured in the same interleaved rounds."""

    model: str
    devices: tuple[Device, ...]
    """Those of the schedule; all other arms run on the first."""
    policy: str
    variant: str
    """How the schedule's sessions execute the model, e.g. `nhwc+bias`."""
    rewrite: str
    """What was made of the model's operators before, e.g. `merge`; `none` for nothing."""
    arms: tuple[Arm, ...]
    through_host: tuple[str, ...]
    """Pairs of GPUs of the schedule whose tensors go through the host: without peer access."""
    environment: Mapping[str, Any]

    def arm(self, name: str) -> Arm:
        """The arm of this name.

        Raises:
            KeyError: It was not measured.
        """
        return {arm.name: arm for arm in self.arms}[name]

    def ratio_to(self, name: str) -> Ratio:
        """How many times faster the schedule is than another arm: device time, else latency."""
        ours, other = self.arm(SCHEDULE), self.arm(name)
        if ours.device_us and other.device_us:
            return ratio(other.device_us, ours.device_us)
        return ratio(other.latency_us, ours.latency_us)

    @property
    def rival(self) -> str:
        """The strongest arm of plain ONNX Runtime, which `--fail-under` compares with."""
        plain = [arm for arm in self.arms if arm.name in ("ort", "ort-graph")]
        return min(plain, key=lambda a: (a.device or a.latency).median_us).name

    def to_json(self) -> dict[str, Any]:
        """A JSON object with summaries, ratios and every sample."""
        return {
            "schema_version": 1,
            "model": self.model,
            "devices": [str(device) for device in self.devices],
            "policy": self.policy,
            "variant": self.variant,
            "rewrite": self.rewrite,
            "arms": {arm.name: _arm_json(arm) for arm in self.arms},
            "ratios": {
                arm.name: dataclasses.asdict(self.ratio_to(arm.name))
                for arm in self.arms
                if arm.name != SCHEDULE
            },
            "through_host": list(self.through_host),
            "environment": dict(self.environment),
        }


def _arm_json(arm: Arm) -> dict[str, Any]:
    return {
        "what": ARMS[arm.name],
        "capture": arm.capture,
        "refusal": arm.refusal,
        "device": None if arm.device is None else dataclasses.asdict(arm.device),
        "latency": dataclasses.asdict(arm.latency),
        "device_us": [[round(s, 3) for s in samples] for samples in arm.device_us],
        "latency_us": [[round(s, 3) for s in samples] for samples in arm.latency_us],
        "memory_nbytes": arm.memory_nbytes,
    }


def bench(
    path: str | os.PathLike[str],
    *,
    against: Sequence[str] = (),
    original: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    warmup_ms: float = 200.0,
    duration_s: float = 3.0,
    iterations: int = 100,
    custom_ops: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> BenchResult:
    """Measure an annotated model and what it is compared with, in interleaved rounds.

    Args:
        path: An annotated model.
        against: Names in `ARMS`; if empty, all that device and model allow but `schedule-ort`.
            `ort` or `ort-graph` and the schedule itself are always measured.
        original: What the plain ORT arms run; the annotated model without its schedule if None.
        inputs: Values for inputs; others are drawn at random.
        warmup_ms: Every arm runs at least this long before it is measured.
        duration_s: Measure at least this long in all.
        iterations: At least this many samples an arm.
        custom_ops: Shared libraries with custom operators.
        progress: Told what is being done.

    Raises:
        UsageError: There is no such file or arm, or a value or a number does not fit.
        AnnotationError: The model carries no schedule.
        DeviceError: The schedule's device is not on this machine.
    """
    require_time("--warmup", warmup_ms)
    require_time("--duration", duration_s)
    if iterations < 1:
        raise UsageError(f"--iterations {iterations} is too few; give at least 1.")
    model = read_model(path)
    annotation = read_annotation(model)
    devices = annotation.devices
    device = devices[0]
    names = arm_names(against, device, needed_by_ort_graph(annotation, original is not None))
    libraries = tuple(custom_ops)
    lowered = lowered_source(model, annotation, libraries)
    baseline = baseline_of(model, annotation, original, device, libraries)
    feeds = random_inputs(model, annotation.tensors, 0, given := inputs or {})
    outputs = [value.name for value in model.graph.output]
    with cuda.one_graph_stream(), cuda.other_contexts(devices), ExitStack() as stack:
        stack.enter_context(random_blamed(feeds, given))
        runs = []
        sources = {name: baseline if name.startswith("ort") else lowered for name in names}
        steps = len(names) * (2 if device.kind == "cuda" else 1)
        if device.kind == "cuda":  # first sessions load kernels of libraries, which are no arm's
            for number, name in enumerate(names):
                progress("preparing", number, steps)
                with open_arm(name, sources[name], model, annotation, libraries) as executor:
                    executor.run(feeds, outputs)
        for number, name in enumerate(names, start=steps - len(names)):
            progress("preparing", number, steps)
            free_nbytes = _free_nbytes(devices)
            executor = open_arm(name, sources[name], model, annotation, libraries)
            stack.callback(executor.close)
            runs.append(_ArmRun(name, executor, feeds, outputs, devices, free_nbytes))
        _measure(runs, warmup_ms, duration_s, iterations, progress)
        arms = tuple(run.result() for run in runs)
    return BenchResult(
        model=Path(path).name,
        devices=devices,
        policy=str(annotation.details.get("policy", "")),
        variant=str(annotation.variant),
        rewrite=str(annotation.details.get("rewrite", "none")),
        arms=arms,
        through_host=pairs_through_host(devices),
        environment=describe_environment(device),
    )


def _free_nbytes(devices: Sequence[Device]) -> int | None:
    """Memory that is free on all GPUs together; None on the CPU."""
    if devices[0].kind == "cpu":
        return None
    return sum(cuda.free_memory_nbytes(device) for device in devices)


class _ArmRun:
    """An executor being measured."""

    def __init__(
        self,
        name: str,
        executor: Executor,
        feeds: dict[str, Any],
        outputs: list[str],
        devices: Sequence[Device],
        free_nbytes: int | None,
    ) -> None:
        """Run once, and see what that has taken of the memory that was free before."""
        self._name, self._executor = name, executor
        self._run: Callable[[], list[Any]] = lambda: executor.run(feeds, outputs)
        self._run()
        left_nbytes = _free_nbytes(devices)
        self._memory_nbytes = (
            None if free_nbytes is None or left_nbytes is None else free_nbytes - left_nbytes
        )
        self._device_us: list[tuple[float, ...]] = []
        self._latency_us: list[tuple[float, ...]] = []

    def warm_up(self, warmup_ms: float) -> None:
        end = time.monotonic() + warmup_ms / 1e3
        self._run()
        while time.monotonic() < end:
            self._run()

    def measure(self, count: int) -> None:
        executor = self._executor
        if isinstance(executor, StreamExecutor) and executor.is_one_piece:
            stream = executor.main_stream
            self._device_us.append(cuda.time_launches_us(stream, executor.launch, count))
        self._latency_us.append(time_runs_us(self._run, count))

    def result(self) -> Arm:
        return Arm(
            self._name,
            str(self._executor.capture),
            self._executor.refusal,
            tuple(self._device_us),
            tuple(self._latency_us),
            self._memory_nbytes,
        )


def _measure(
    runs: Sequence[_ArmRun],
    warmup_ms: float,
    duration_s: float,
    iterations: int,
    progress: Callable[[str, int, int], None],
) -> None:
    for run in runs:
        run.warm_up(warmup_ms)
    count = max(1, -(-iterations // _ROUND_COUNT))
    end = time.monotonic() + duration_s
    number = 0
    while number < _ROUND_COUNT or time.monotonic() < end:
        progress("measuring", min(number, _ROUND_COUNT), _ROUND_COUNT)
        for run in runs:
            run.measure(count)
        number += 1
