"""The arms of the benchmark suite on a GPU."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxsched.inputs import random_inputs
from onnxsched.loading import load_model
from onnxsched_runtime.device import Device
from tools import suite_worker
from tools.peers import (
    ORT_ARMS,
    TORCH_ARMS,
    ExecutorArm,
    open_arm,
    reference_arm,
    time_arm_us,
)
from tools.suite_worker import Job, measured

GPU = Device("cuda")
EAGER = [name for name, settings in TORCH_ARMS.items() if settings.compile_mode is None]
COMPILED = ["torch-compile", "torch-compile-frozen-nhwc", "torch-reduce-overhead"]


@pytest.fixture
def job(
    name: str, zoo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """What measures an arm of SqueezeNet here, as soon as it is prepared."""
    turn = threading.Event()
    turn.set()
    monkeypatch.setattr(suite_worker, "_turn", turn)
    source, ready = str(zoo("squeezenet")), str(tmp_path / "ready")
    return Job("measure", name, source, "", "", "cuda:0", "", ready, 1.0, 20)


@pytest.mark.parametrize("name", [*ORT_ARMS, *EAGER, *COMPILED])
def test_an_arm_computes_what_the_reference_does(name: str, job: Job) -> None:
    found = measured(job)
    assert found["relative_difference"] < 1e-2
    assert found["time"]["count"] == found["reference"]["count"] == 20
    assert (found["compile_s"] is not None) == (name in COMPILED)


@pytest.mark.alone  # memory is counted for the whole device
@pytest.mark.parametrize("name", ["ort", "torch-graph", "torch-reduce-overhead"])
def test_the_memory_of_an_arm_is_counted(name: str, job: Job) -> None:
    assert measured(job)["memory_nbytes"] > 0


@pytest.mark.parametrize("name", EAGER)
def test_an_arm_reads_its_inputs_in_each_launch(name: str, zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo("squeezenet"), GPU)
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    with open_arm(name, model, GPU, feeds) as arm:
        before = arm.outputs()
        arm._inputs[0].zero_()  # type: ignore[union-attr]
        assert not any(np.array_equal(a, b) for a, b in zip(before, arm.outputs(), strict=True))


def test_a_graph_is_not_slower_than_eager_mode(zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo("squeezenet"), GPU)
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    times_us = {}
    for name in ("torch-eager", "torch-graph", reference_arm(GPU)):
        with open_arm(name, model, GPU, feeds) as arm:
            times_us[name] = statistics.median(time_arm_us(arm, 20))
    assert times_us["torch-graph"] < times_us["torch-eager"]
    assert times_us["ort-graph"] < times_us["torch-eager"]


def test_the_best_of_plain_onnx_runtime_is_found(zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo("squeezenet"), GPU)
    feeds = random_inputs(model.baseline, model.tensors, seed=0)
    with open_arm("ort-best", model, GPU, feeds) as arm:
        assert isinstance(arm, ExecutorArm)
        assert arm.variant is not None
        assert arm.variant.layout == "nhwc"
