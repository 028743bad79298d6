"""Models scheduled over two GPUs, and the copies between them as they are measured."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import onnxsched
from onnxsched.contraction import contract_chains
from onnxsched.inputs import random_inputs
from onnxsched.inspection import inspect_model
from onnxsched.loading import graph_from_model, load_model
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.transfers import SIZES_NBYTES, measure_transfers
from onnxsched.schedule import Schedule, Slot
from onnxsched.schedule_file import placements_to_json
from onnxsched.trial import TrialRunner
from onnxsched.variants import lowered_model
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.variant import Variant
from sample_models import build
from support.models import feeds_for
from support.optimizing import plain_outputs

GPUS = (Device("cuda", 0), Device("cuda", 1))


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if cuda.device_count() < len(GPUS):
        pytest.skip("needs two CUDA devices")


@pytest.mark.alone  # a link that others use is as slow as they make it
def test_curves_rise_and_are_those_of_a_link() -> None:
    curves = measure_transfers(GPUS, MeasurementCache(None, ""), lambda *_: None)
    assert curves.keys() == {*permutations(GPUS, 2)}
    for (source, target), curve in curves.items():
        assert tuple(nbytes for nbytes, _ in curve.points) == SIZES_NBYTES
        assert curve.is_peer == cuda.has_peer_access(target, source)
        assert 1.0 < curve.us(4096) < 100.0
        gigabytes_per_s = SIZES_NBYTES[-1] / curve.us(SIZES_NBYTES[-1]) / 1e3
        assert 1.0 < gigabytes_per_s < 2000.0


def test_a_second_gpu_is_never_slower_than_one_stream(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    result = onnxsched.optimize(
        zoo("googlenet"), tmp_path / "a.onnx",
        device="cuda:0,cuda:1", cache_dir=cache_dir, budget_s=16.0,
    )  # fmt: skip
    assert result.sequential_us is not None
    assert result.measured_us <= result.sequential_us
    assert result.refusal is None
    assert {"cuda:0", "cuda:1"} <= {d for a in result.alternatives for d in a["devices"]}


@pytest.mark.parametrize("fuses", [False, True])
def test_trials_over_two_gpus_compute_what_the_model_does(
    zoo: Callable[[str], Path], fuses: bool
) -> None:
    model = load_model(zoo("googlenet"), GPUS[0])
    variant = Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic", fuses=fuses)
    lowered = lowered_model(model, variant, GPUS[0], ())
    contraction = contract_chains(graph_from_model(lowered), with_inputs=True)
    [expected] = plain_outputs(
        zoo("googlenet"), random_inputs(model.baseline, model.tensors, seed=0)
    )
    [output] = [value.name for value in lowered.proto.graph.output]
    rng, largest = random.Random(0), np.abs(expected).max()
    with TrialRunner(lowered, contraction, GPUS, ()) as trials:
        for spread in (0.0, 0.1, 0.5, 1.0):
            slots = [
                Slot(v, Placement(GPUS[rng.random() < spread], rng.randrange(3)))
                for v in range(len(contraction.groups))
            ]
            schedule = Schedule(tuple(slots))
            assert min(trials.measure_us(schedule)) > 0.0
            plan = trials.plan(schedule)
            launched = [plan.segments[index] for index in plan.pieces[0].runs]
            [place] = [t for s in launched for t in s.outputs if plan.original(t) == output]
            buffer = trials._runner.buffers[place]
            streams = trials._runner.streams.items()
            stream = next(s for placement, s in streams if placement.device == buffer.device)
            buffer.fetch(stream)
            stream.synchronize()
            np.testing.assert_allclose(
                buffer.staging, expected, rtol=1e-2, atol=1e-2 * largest, err_msg=f"{spread}"
            )
            buffer.fill(np.zeros_like(expected), stream)
            stream.synchronize()


def test_a_schedule_from_a_file_uses_both_gpus_in_one_graph(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    source, target, file = zoo("googlenet"), tmp_path / "a.onnx", tmp_path / "s.json"
    onnxsched.optimize(source, target, policy="nimble", cache_dir=cache_dir, budget_s=1.0)
    content = placements_to_json(inspect_model(target).annotation.placements)
    for entry in content["operators"]:
        entry["device"] = f"cuda:{entry['stream'] % 2}"
    file.write_text(json.dumps(content))
    result = onnxsched.optimize(source, target, schedule=file, cache_dir=cache_dir, budget_s=1.0)
    assert (result.policy, result.devices, result.capture) == ("file", GPUS, "whole")
    with onnxsched.load(target) as session:
        for seed in (5, 6):
            feeds = feeds_for(build("googlenet"), seed)
            [actual], [expected] = session.run(None, feeds), plain_outputs(source, feeds)
            largest = np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-2 * largest)
