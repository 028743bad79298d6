"""Run each distinct operator alone on the device and time it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from onnxsched.inputs import random_array
from onnxsched.loading import Model
from onnxsched.profile import Kernel, Multiprocessor, OperatorProfile, Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.kernels import kernels_by_range
from onnxsched.profiling.roofline import roofline_from_profiles, roofline_model
from onnxsched.profiling.signature import OperatorSignatures
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import CaptureError
from onnxsched_runtime.executors.streams import SegmentRunner
from onnxsched_runtime.model import ModelSource, node_reads
from onnxsched_runtime.partition import assemble
from onnxsched_runtime.plan import Segment
from onnxsched_runtime.session import OrtSession, SessionSettings

SAMPLE_COUNT = 9
"""Samples of each operator; the median is what scheduling uses."""
_REPEAT_COUNT = 10
"""Runs inside the CUDA graph of one sample, so that launching does not count."""
_BATCH_COUNT = 32
"""Sessions alive at a time: each may hold tens of megabytes of workspace."""
_CPU_BUDGET_US = 50_000.0
"""No more samples of an operator than fit in here, but at least three."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


def measure_profile(
    model: Model,
    device: Device,
    cache: MeasurementCache,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> Profile:
    """Measure every operator of a model alone, each distinct one once.

    Raises:
        ModelError: ORT refuses an operator on its own.
    """
    reference = roofline_model(device)
    peaks, _ = _measure_nodes(reference, device, cache, (), _quiet)
    roofline = roofline_from_profiles(device, peaks["product"], peaks["pass"])
    operators, measured_count = _measure_nodes(model, device, cache, custom_ops, progress)
    signatures = OperatorSignatures(model)
    return Profile(
        operators=operators,
        bounds={
            node.name: roofline.bound(signatures.flop_count(node), signatures.nbytes(node))
            for node in model.proto.graph.node
        },
        multiprocessor=_multiprocessor(device),
        measured_count=measured_count,
    )


def _measure_nodes(
    model: Model,
    device: Device,
    cache: MeasurementCache,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> tuple[dict[str, OperatorProfile], int]:
    """Profiles by node name, and how many distinct operators had to be run for them."""
    signatures = OperatorSignatures(model)
    nodes = [n for n in model.proto.graph.node if n.name not in model.host_reasons]
    key_of = {node.name: signatures.of(node) for node in nodes}
    representative: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        representative.setdefault(key_of[node.name], node)
    kept = {key: _cached(cache, key) for key in representative}
    found = {key: profile for key, profile in kept.items() if profile is not None}
    missing = [key for key in representative if key not in found]
    measure = _measure_on_gpu if device.kind == "cuda" else _measure_on_cpu
    for start in range(0, len(missing), _BATCH_COUNT):
        progress("profiling operators", start, len(missing))
        keys = missing[start : start + _BATCH_COUNT]
        profiles = measure(model, device, [representative[key] for key in keys], custom_ops)
        for key, profile in zip(keys, profiles, strict=True):
            cache.write(key, dataclasses.asdict(profile))
            found[key] = profile
    host = {name: OperatorProfile(()) for name in model.host_reasons}
    return {name: found[key] for name, key in key_of.items()} | host, len(missing)


def _cached(cache: MeasurementCache, key: str) -> OperatorProfile | None:
    content = cache.read(key)
    try:
        return None if content is None else OperatorProfile.from_json(content)
    except (KeyError, TypeError, ValueError):
        return None


def _quiet(what: str, done: int, total: int) -> None:
    pass


def _segment(model: Model, node: onnx.NodeProto, placement: Placement) -> Segment:
    weights = {weight.name for weight in model.proto.graph.initializer}
    inputs = tuple(name for name in node_reads(node) if name not in weights)
    return Segment((node.name,), placement, inputs, tuple(filter(None, node.output)))


def _measure_on_gpu(
    model: Model, device: Device, nodes: Sequence[onnx.NodeProto], custom_ops: tuple[str, ...]
) -> list[OperatorProfile]:
    segments = [_segment(model, node, Placement(device, 0)) for node in nodes]
    inputs = tuple(dict.fromkeys(name for segment in segments for name in segment.inputs))
    plan = assemble(segments, inputs, ())
    source = ModelSource(model.proto, model.tensors)
    runner = SegmentRunner(source, plan, custom_ops=custom_ops)
    try:
        stream = runner.streams[Placement(device, 0)]
        generator = np.random.default_rng(0)
        for name in inputs:
            runner.buffers[name].fill(random_array(model.tensors[name], generator), stream)
        runner.warm_up(plan.pieces[0])
        kernels = _kernels(runner)
        return [
            OperatorProfile(_time_session(runner.sessions[i], stream), kernels.get(str(i), ()))
            for i in range(len(nodes))
        ]
    finally:
        runner.close()


def _kernels(runner: SegmentRunner) -> dict[str, tuple[Kernel, ...]]:
    def run_all() -> None:
        for index, session in enumerate(runner.sessions):
            with cuda.named_range(str(index)):
                session.run_bound()

    return kernels_by_range(cuda.kernel_trace(run_all))


def _time_session(session: OrtSession, stream: cuda.Stream) -> tuple[float, ...]:
    """Samples of one run's time, from graphs that hold many runs."""

    def run_repeatedly() -> None:
        for _ in range(_REPEAT_COUNT):
            session.run_bound()

    try:
        graph = cuda.Graph.capture(stream, run_repeatedly)
    except CaptureError:
        samples = cuda.time_launches_us(stream, run_repeatedly, SAMPLE_COUNT)
    else:
        samples = cuda.time_launches_us(stream, lambda: graph.launch(stream), SAMPLE_COUNT)
        graph.close()
    return tuple(max(sample / _REPEAT_COUNT, 1e-3) for sample in samples)


def _measure_on_cpu(
    model: Model, device: Device, nodes: Sequence[onnx.NodeProto], custom_ops: tuple[str, ...]
) -> list[OperatorProfile]:
    source = ModelSource(model.proto, model.tensors)
    settings = SessionSettings(device, level="all", thread_count=1, custom_ops=custom_ops)
    profiles = []
    for node in nodes:
        segment = _segment(model, node, Placement(device, 0))
        generator = np.random.default_rng(0)
        feeds = {n: random_array(model.tensors[n], generator) for n in segment.inputs}
        with OrtSession(source.extract(segment), settings) as session:
            profiles.append(OperatorProfile(_time_on_cpu(session, feeds)))
    return profiles


def _time_on_cpu(session: OrtSession, feeds: dict[str, np.ndarray]) -> tuple[float, ...]:
    session.run(feeds)
    samples: list[float] = []
    while len(samples) < SAMPLE_COUNT and (len(samples) < 3 or sum(samples) < _CPU_BUDGET_US):
        start_ns = time.perf_counter_ns()
        session.run(feeds)
        samples.append(max((time.perf_counter_ns() - start_ns) / 1e3, 1e-3))
    return tuple(samples)


def _multiprocessor(device: Device) -> Multiprocessor | None:
    if device.kind == "cpu":
        return None
    properties = cuda.device_properties(device)
    return Multiprocessor(
        properties["shared_memory_nbytes"], properties["registers"], properties["threads"]
    )
