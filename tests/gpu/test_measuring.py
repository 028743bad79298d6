"""Profiles, benchmarks and diagnoses on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxsched
from onnxsched.doctor import diagnose
from onnxsched.inputs import random_inputs
from onnxsched.loading import load_model
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.isolation import ProfilingWorker
from onnxsched.profiling.measure import measure_profile
from onnxsched.racing import time_runs_us
from onnxsched.throughput import ARMS as THROUGHPUT_ARMS
from onnxsched.throughput import COPIES, measure_throughput
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.cuda import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.files import read_model

_MOVES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
"""Operators that need no kernel: ORT copies, or not even that."""


def test_every_computing_operator_has_its_own_kernels(
    zoo: Callable[[str], Path], cache_dir: Path
) -> None:
    model = load_model(zoo("googlenet"), Device("cuda"))
    cache = MeasurementCache(cache_dir, "")
    with ProfilingWorker() as worker:
        profile = measure_profile(model, Device("cuda"), cache, (), lambda *_: None, worker)
    for node in model.proto.graph.node:
        operator = profile.operators[node.name]
        assert len(operator.samples_us) == 9
        assert operator.refusal is None
        if node.op_type in _MOVES:
            continue
        assert operator.kernels, node.name
        in_kernels_us = sum(kernel.duration_us for kernel in operator.kernels)
        assert 0.2 * in_kernels_us < operator.duration_us < 5 * in_kernels_us + 5, node.name
        for kernel in operator.kernels:
            assert min(*kernel.grid, *kernel.block, kernel.registers) > 0
            assert 0 <= kernel.occupancy <= 1
        assert 0 < profile.cost(node.name).block_share <= 1


def test_bench_measures_every_arm_the_same_way(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    onnxsched.optimize(zoo("squeezenet"), target, cache_dir=cache_dir, budget_s=4.0)
    arms = ("ort", "ort-graph", "sequential", "schedule-ort")
    result = onnxsched.bench(
        target,
        against=arms,
        original=zoo("squeezenet"),
        duration_s=0.5,
        iterations=40,
        warmup_ms=50,
    )
    captures = {arm.name: (arm.capture, arm.refusal) for arm in result.arms}
    assert captures == {
        "ort": ("none", None),
        "ort-graph": ("ort", None),
        "sequential": ("whole", None),
        "schedule": ("whole", None),
        "schedule-ort": ("ort", None),
    }
    rounds = {len(arm.device_us) for arm in result.arms}
    assert len(rounds) == 1
    assert result.rival == "ort-graph"
    assert result.ratio_to("ort").value > 1
    assert 0.9 < result.ratio_to("schedule").value < 1.1


@pytest.mark.alone
def test_every_arm_of_a_benchmark_holds_at_least_its_weights(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    onnxsched.optimize(zoo("squeezenet"), target, cache_dir=cache_dir, budget_s=4.0)
    result = onnxsched.bench(target, original=zoo("squeezenet"), duration_s=0.1, iterations=20)
    model = read_model(zoo("squeezenet"))
    weights_nbytes = sum(len(weight.raw_data) for weight in model.graph.initializer)
    held = {arm.name: arm.memory_nbytes or 0 for arm in result.arms}
    assert min(held.values()) > 0.9 * weights_nbytes > 1 << 20


def test_several_requests_in_flight_are_served_by_copies(
    zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    onnxsched.optimize(zoo("squeezenet"), target, cache_dir=cache_dir, budget_s=4.0)
    found = measure_throughput(target, duration_s=0.2)
    loads = {(load.arm, load.in_flight): load for load in found.loads}
    assert loads.keys() == {(arm, count) for arm in THROUGHPUT_ARMS for count in COPIES}
    assert all(load.requests_per_s * 0.2 > 20 for load in found.loads)
    assert found.best.in_flight > 1


def test_streams_are_never_aliased() -> None:
    streams = [Stream(Device("cuda")) for _ in range(100)]
    assert len({stream.handle for stream in streams}) == 100
    for stream in streams:
        stream.close()


@pytest.mark.alone  # two percent are less than what neighbours cost
def test_streams_that_are_idle_slow_nothing_down(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    onnxsched.optimize(
        zoo("squeezenet"), target, policy="opara", streams=2, cache_dir=None, budget_s=0.0
    )
    used: list[Stream] = []
    with onnxsched.load(target) as session:
        executor = session.executor
        assert isinstance(executor, StreamExecutor)

        def time_us() -> float:
            samples = cuda.time_launches_us(executor.main_stream, executor.launch, 40)
            return float(np.median(samples))

        def use_streams() -> None:
            for stream in used:
                stream.delay(1000)

        fresh_us = time_us()
        used += [Stream(Device("cuda")) for _ in range(16)]
        use_streams()
        least_us = min(fresh_us, time_us())
        with cuda.other_contexts([Device("cuda")]):
            for _ in range(3):
                use_streams()
                assert time_us() <= 1.02 * least_us
    for stream in used:
        stream.close()


def test_the_doctor_loads_the_provider_for_real() -> None:
    found = diagnose()
    assert found.is_gpu_ready
    assert found.environment["cudnn"]
    assert found.devices[0]["multiprocessor_count"] > 0


@pytest.mark.alone
@pytest.mark.parametrize("name", ["deepfm", "googlenet"])
def test_a_run_costs_little_beyond_launching_its_graph(
    name: str, zoo: Callable[[str], Path], cache_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    onnxsched.optimize(
        zoo(name), target, policy="heft", variants=False, cache_dir=cache_dir, budget_s=4.0
    )
    model = read_model(target)
    feeds = random_inputs(model, read_annotation(model).tensors, seed=0)
    with onnxsched.load(target) as session:
        session.run(None, feeds)
        executor = session.executor
        assert isinstance(executor, StreamExecutor)
        assert executor._pieces is not None
        (ready,) = executor._pieces.with_copies.values()
        buffers, graph, stream = executor._runner.buffers, ready.graph, ready.stream

        def bare() -> list[np.ndarray]:
            for tensor, array in feeds.items():
                buffers[tensor].stage(array)
            graph.launch(stream)
            stream.synchronize()
            return [array.copy() for array in ready.outputs.values() if array is not None]

        def ours() -> list[np.ndarray]:
            return list(session.run(None, feeds))

        samples: dict[Callable[[], Any], list[float]] = {ours: [], bare: []}
        for number in range(400):  # each is as often the first: what was before takes its time
            for run in (ours, bare) if number % 2 else (bare, ours):
                samples[run] += time_runs_us(run, 1)
    assert np.median(np.subtract(samples[ours], samples[bare])) < 10
