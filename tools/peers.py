"""The arms of the benchmark suite: one model, ready to be launched on fixed buffers.

Every arm launches on a CUDA stream of its own, so that one function times them all. TF32 is
allowed in each, as ONNX Runtime does by default.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from onnxsched.comparison import Tolerances, difference
from onnxsched.loading import Model
from onnxsched.policies import POLICIES
from onnxsched.racing import time_runs_us
from onnxsched.variants import possible_variants
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import CaptureError, ModelError, OnnxschedError, UsageError
from onnxsched_runtime.execution import Executor, open_executor
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.load import load
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from tools.torch_arm import TorchArm, TorchSettings

_SAMPLE_COUNT = 20
"""Launches that a variant is chosen by."""
_NEAR = Tolerances(1e-2)
"""TF32 makes 1e-3 of it, garbage far more."""


def _torch_arms() -> dict[str, TorchSettings]:
    """The torch arms; those that can gain from it in both layouts."""
    arms = {"torch-eager": TorchSettings("torch, eager")}
    for name, settings in {
        "torch-graph": TorchSettings("torch, eager, in one CUDA graph", None, True),
        "torch-compile": TorchSettings("torch.compile, in one CUDA graph", "default", True),
        "torch-compile-frozen": TorchSettings(
            "torch.compile with folded weights, in one CUDA graph", "default", True, is_frozen=True
        ),
        "torch-reduce-overhead": TorchSettings(
            "torch.compile, reduce-overhead", "reduce-overhead"
        ),
        "torch-max-autotune": TorchSettings(
            "torch.compile, max-autotune with folded weights, in one CUDA graph",
            "max-autotune-no-cudagraphs",
            True,
            is_frozen=True,
        ),
    }.items():
        arms[name] = settings
        arms[f"{name}-nhwc"] = TorchSettings(
            f"{settings.what}, channels last", settings.compile_mode, settings.is_captured,
            True, settings.is_frozen,
        )  # fmt: skip
    return arms


TORCH_ARMS: Mapping[str, TorchSettings] = _torch_arms()
ORT_ARMS: Mapping[str, str] = {
    "ort": "plain ONNX Runtime with IOBinding",
    "ort-graph": "ONNX Runtime with its own CUDA graph",
    "ort-best": "the same in the layout and with the kernels that are fastest, one stream",
}
SCHEDULE_ARMS: Mapping[str, str] = {
    **{name: f"our schedule by the policy {name}, in one CUDA graph" for name in POLICIES},
    "sequential": "our fastest variant and rewrite in one stream, in our CUDA graph",
    "auto": "the fastest of all our policies, as measured by `optimize`",
}
ARMS: Mapping[str, str] = {
    **ORT_ARMS,
    **{name: settings.what for name, settings in TORCH_ARMS.items()},
    **SCHEDULE_ARMS,
}
"""Every arm and what it is."""


def is_possible(name: str, device: Device, has_images: bool) -> bool:
    """Whether an arm makes sense: graphs need a GPU, a layout needs images."""
    settings = TORCH_ARMS.get(name)
    if settings is None:
        return device.kind == "cuda" or name not in ("ort-graph", "ort-best")
    is_for_gpu = settings.is_captured and settings.compile_mode is None
    is_for_gpu |= settings.compile_mode == "reduce-overhead"
    return (device.kind == "cuda" or not is_for_gpu) and (
        has_images or not settings.is_channels_last
    )


def reference_arm(device: Device) -> str:
    """The arm that every other is measured beside."""
    return "ort-graph" if device.kind == "cuda" else "ort"


class ExecutorArm:
    """A plan of ours, whose sessions are ONNX Runtime's."""

    compile_s: float | None = None
    variant: Variant | None = None
    """How plain ONNX Runtime executes the model, where that was chosen."""

    def __init__(
        self,
        executor: Executor,
        close: Callable[[], None],
        feeds: Mapping[str, np.ndarray],
        outputs: Sequence[str],
    ) -> None:
        """Take over an executor, closed by `close`, and fill its inputs.

        Raises:
            CaptureError: It is not captured as was asked for.
            ModelError: Part of it runs on the host, between several launches.
        """
        self._close = close
        try:
            if executor.refusal is not None:
                raise CaptureError(executor.refusal)
            self._first = executor.run(feeds, outputs)
            self.stream: cuda.Stream | None = None
            self.launch: Callable[[], Any] = lambda: executor.run(feeds, outputs)
            if isinstance(executor, StreamExecutor):
                if not executor.is_one_piece:
                    raise ModelError("Part of the model runs on the host; only the rest is timed.")
                self.stream, self.launch = executor.main_stream, executor.launch
        except BaseException:
            close()
            raise

    def outputs(self) -> list[np.ndarray]:
        """The outputs for the feeds."""
        return self._first

    def close(self) -> None:
        """Free sessions, graphs, streams and buffers."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Arm = ExecutorArm | TorchArm
"""`launch` it on its `stream` (None on the CPU, where a launch returns when all is done)."""


def open_arm(
    name: str,
    model: Model,
    device: Device,
    feeds: Mapping[str, np.ndarray],
    schedule: Path | None = None,
) -> Arm:
    """Make an arm ready.

    Args:
        name: One of `ARMS`.
        model: What the torch and ORT arms run, as it was before ORT fused it.
        device: Where it runs.
        feeds: The values of the inputs, which stay on the device.
        schedule: The annotated model that an arm of ours runs.

    Raises:
        OnnxschedError: The model, the capture or the device is refused.
    """
    cuda.require_device(device)
    if name in TORCH_ARMS:
        return TorchArm(model.baseline, TORCH_ARMS[name], device, feeds)
    outputs = [value.name for value in model.baseline.graph.output]
    if name == "ort-best":
        return _fastest_ort(model, device, feeds, outputs)
    if name in ORT_ARMS:
        capture: Capture = "ort" if name == "ort-graph" else "none"
        return _plain_ort(model, device, feeds, outputs, capture, DEFAULT_VARIANT)
    if schedule is None:
        raise UsageError(f"Arm '{name}' needs an annotated model; optimize it first.")
    session = load(schedule)
    return ExecutorArm(session.executor, session.close, feeds, outputs)


def _plain_ort(
    model: Model,
    device: Device,
    feeds: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    capture: Capture,
    variant: Variant,
) -> ExecutorArm:
    """ONNX Runtime by itself, on the model as it was given."""
    main = Placement(device, 0)
    placements = dict.fromkeys((node.name for node in model.baseline.graph.node), main)
    plan = plan_model(model.baseline, placements, {})
    source = ModelSource(model.baseline, model.tensors, variant)
    executor = open_executor(source, plan, capture=capture)
    arm = ExecutorArm(executor, executor.close, feeds, outputs)
    arm.variant = variant
    return arm


def _fastest_ort(
    model: Model, device: Device, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> ExecutorArm:
    """The fastest variant of plain ONNX Runtime that computes what the default one does.

    Raises:
        OnnxschedError: ONNX Runtime refuses the default one.
    """
    best = _plain_ort(model, device, feeds, outputs, "ort", DEFAULT_VARIANT)
    expected, best_us = best.outputs(), _median_us(best)
    for variant in possible_variants(model, device)[1:]:
        if variant.fuses:  # ours, not ONNX Runtime's
            continue
        try:
            arm = _plain_ort(model, device, feeds, outputs, "ort", variant)
        except OnnxschedError:
            continue
        pairs = zip(outputs, arm.outputs(), expected, strict=True)
        is_right = all(difference(name, a, b, _NEAR).is_within for name, a, b in pairs)
        arm_us = _median_us(arm)
        sys.stderr.write(f"{variant}: {arm_us:.1f} us, {'equal' if is_right else 'wrong'}\n")
        if is_right and arm_us < best_us:
            arm, best, best_us = best, arm, arm_us
        arm.close()
    return best


def _median_us(arm: ExecutorArm) -> float:
    time_arm_us(arm, _SAMPLE_COUNT)  # warm
    return statistics.median(time_arm_us(arm, _SAMPLE_COUNT))


def time_arm_us(arm: Arm, count: int) -> tuple[float, ...]:
    """Time of a launch, one sample a launch: on the device, or of the whole call on the CPU."""
    if arm.stream is None:
        return time_runs_us(arm.launch, count)
    return cuda.time_launches_us(arm.stream, arm.launch, count)
