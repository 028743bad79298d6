"""Schedules over two GPUs: one graph over both, and the bits of one session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import onnxsched
from onnxsched.inputs import random_inputs
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation, read_annotation, write_annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import DeviceError
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.files import read_model, write_model
from onnxsched_runtime.load import Session
from support import models

pytestmark = pytest.mark.skipif(cuda.device_count() < 2, reason="needs two GPUs")
_NAMES = ["googlenet", "deepfm", "bert"]


def _over_two(annotation: Annotation, period: int) -> Annotation:
    """Every `period` operators of the launch order go to the other GPU."""
    placements = {
        name: Placement(Device("cuda", number // period % 2), placement.stream)
        for number, (name, placement) in enumerate(annotation.placements.items())
    }
    return replace(annotation, placements=placements)


@pytest.fixture(scope="module")
def scheduled(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A model of the zoo, scheduled for one GPU."""
    folder = tmp_path_factory.mktemp("devices")
    done: dict[str, Path] = {}

    def optimized(name: str) -> Path:
        if name not in done:
            done[name] = folder / f"{name}.onnx"
            onnxsched.optimize(
                zoo(name),
                done[name],
                device="cuda:0",
                policy="heft",
                streams=2,
                variants=False,
                cache_dir=cache_dir,
                budget_s=2.0,
            )
        return done[name]

    return optimized


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("capture", ["whole", "none"])
def test_two_gpus_compute_what_one_does(
    scheduled: Callable[[str], Path], name: str, capture: str
) -> None:
    model = read_model(scheduled(name))
    annotation = read_annotation(model)
    spread = _over_two(annotation, period=7)
    with (
        Session(model, annotation) as one,
        Session(model, spread, capture=capture) as two,  # type: ignore[arg-type]
    ):
        assert (two.capture, two.refusal) == (capture, None)
        assert two.plan.copies
        for seed in range(1000 if capture == "whole" and name == "googlenet" else 20):
            feeds = random_inputs(model, annotation.tensors, seed)
            for a, b in zip(two.run(None, feeds), one.run(None, feeds), strict=True):
                np.testing.assert_array_equal(a, b)


def test_it_is_one_graph_over_both(scheduled: Callable[[str], Path]) -> None:
    model = read_model(scheduled("googlenet"))
    with Session(model, _over_two(read_annotation(model), period=9)) as session:
        assert isinstance(session.executor, StreamExecutor)
        assert session.executor.is_one_piece
        assert session.executor.graph_count == 1
        assert len(session.plan.devices) == 2


_WITHOUT_PEERS = """
import sys
import numpy as np
import onnxsched
from onnxsched.inputs import random_inputs
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.files import read_model, write_model

cuda.enable_peer_access = lambda devices: None
model = read_model(sys.argv[1])
tensors = read_annotation(model).tensors
with onnxsched.load(sys.argv[1]) as one, onnxsched.load(sys.argv[2]) as two:
    assert (two.capture, two.refusal, two.executor.graph_count) == ("whole", None, 1), two.refusal
    for seed in range(5):
        feeds = random_inputs(model, tensors, seed)
        for a, b in zip(two.run(None, feeds), one.run(None, feeds), strict=True):
            np.testing.assert_array_equal(a, b)
"""


def test_without_peer_access_copies_go_through_the_host_in_one_graph(
    scheduled: Callable[[str], Path], tmp_path: Path
) -> None:
    one, two = scheduled("googlenet"), tmp_path / "two.onnx"
    model = read_model(one)
    write_annotation(model, _over_two(read_annotation(model), period=7))
    write_model(model, two)
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PEERS, str(one), str(two)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_tensors_on_the_other_gpu_are_ready_on_its_current_stream(tmp_path: Path) -> None:
    import torch

    side, steps = 2048, 12
    text = "\n".join(f"t{n + 1} = MatMul(t{n}, w)" for n in range(steps))
    model = models.model_of(
        f"(float[{side},{side}] t0) => (float[{side},{side}] t{steps}) {{ {text} }}",
        w=np.eye(side, dtype=np.float32),
    )
    annotation = models.annotation_of(model, device=Device("cuda"), device_count=1)
    last = model.graph.node[-1].name
    there = {**annotation.placements, last: Placement(Device("cuda", 1), 0)}
    with Session(model, replace(annotation, placements=there)) as session:
        for seed in range(20):
            image = torch.full((side, side), float(seed + 1), device="cuda:0")
            (result,) = session.run(None, {"t0": image})
            assert result.device == torch.device("cuda:1")
            assert (result.min().item(), result.max().item()) == (seed + 1, seed + 1)


def test_a_schedule_moves_to_the_other_gpu(scheduled: Callable[[str], Path]) -> None:
    path = scheduled("deepfm")
    model = read_model(path)
    feeds = random_inputs(model, read_annotation(model).tensors, 0)
    with (
        onnxsched.load(path) as here,
        onnxsched.load(path, device_map={"cuda:0": "cuda:1"}) as there,
    ):
        assert there.device == Device("cuda", 1)
        np.testing.assert_array_equal(here.run(None, feeds)[0], there.run(None, feeds)[0])
    with pytest.raises(DeviceError, match="cuda:9 is not available"):
        onnxsched.load(path, device_map={"cuda:0": "cuda:9"})
