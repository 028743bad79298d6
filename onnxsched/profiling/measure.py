"""Run each distinct operator alone on the device and time it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx

from onnxsched.inputs import model_inputs, repeated_array
from onnxsched.loading import Model
from onnxsched.profile import Multiprocessor, OperatorProfile, Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.gpu import SAMPLE_COUNT, measure_on_gpu, operator_segment
from onnxsched.profiling.roofline import roofline_from_profiles, roofline_model
from onnxsched.profiling.sharing import Profiler
from onnxsched.profiling.signature import OperatorSignatures
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.model import input_values
from onnxsched_runtime.moves import left_in_place
from onnxsched_runtime.moving import moved_nodes
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings

_NOTHING_US = 1e-3
"""Samples are positive."""
_CPU_BUDGET_US = 50_000.0
"""No more samples of an operator than fit in here, but at least three."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""

_Measure = Callable[
    [Model, Device, Sequence[onnx.NodeProto], tuple[str, ...]],
    Iterable[tuple[str, OperatorProfile]],
]


def measure_profile(
    model: Model,
    device: Device,
    cache: MeasurementCache,
    custom_ops: tuple[str, ...],
    progress: Progress,
    worker: Profiler | None,
) -> Profile:
    """Measure every operator of a model alone, each distinct one once.

    Args:
        model: The model.
        device: Where to measure.
        cache: Where measurements are kept.
        custom_ops: Libraries of custom operators.
        progress: Told what is being done.
        worker: Measures on a GPU; None measures on the CPU.

    Raises:
        ModelError: ORT refuses an operator on its own.
    """
    peaks, _ = _measure_nodes(
        roofline_model(device), device, cache, (), measure_on_gpu if worker else _measure_on_cpu
    )
    roofline = roofline_from_profiles(device, peaks["product"], peaks["pass"])
    operators, measured_count = _measure_nodes(
        model, device, cache, custom_ops, worker.measure if worker else _measure_on_cpu, progress
    )
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
    measure: _Measure,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, OperatorProfile], int]:
    """Profiles by node name, and how many distinct operators had to be run for them."""
    signatures = OperatorSignatures(model, custom_ops)
    free = _free(model)
    left_out = {*model.host_reasons, *free}
    nodes = [node for node in model.proto.graph.node if node.name not in left_out]
    key_of = {node.name: signatures.of(node) for node in nodes}
    representative: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        representative.setdefault(key_of[node.name], node)
    kept = {key: _cached(cache, key) for key in representative}
    found = {key: profile for key, profile in kept.items() if profile is not None}
    missing = [key for key in representative if key not in found]
    for name, profile in measure(model, device, [representative[k] for k in missing], custom_ops):
        progress("profiling operators", len(found), len(representative))
        cache.write(key_of[name], dataclasses.asdict(profile))
        found[key_of[name]] = profile
    host = {name: OperatorProfile(()) for name in model.host_reasons}
    known = {name: found[key] for name, key in key_of.items()}
    return known | host | dict.fromkeys(free, OperatorProfile((_NOTHING_US,))), len(missing)


def _free(model: Model) -> frozenset[str]:
    """Nodes that leave numbers where they are."""
    source = model.source
    return left_in_place(moved_nodes(source), source.ends)


def _cached(cache: MeasurementCache, key: str) -> OperatorProfile | None:
    content = cache.read(key)
    try:
        return None if content is None else OperatorProfile.from_json(content)
    except (KeyError, TypeError, ValueError):
        return None


def _measure_on_cpu(
    model: Model, device: Device, nodes: Sequence[onnx.NodeProto], custom_ops: tuple[str, ...]
) -> Iterator[tuple[str, OperatorProfile]]:
    source = model.source
    settings = SessionSettings(device, thread_count=1, custom_ops=custom_ops)
    segments = [operator_segment(source, node, Placement(device, 0)) for node in nodes]
    values = {
        **_integers(model, (n for segment in segments for n in segment.inputs), settings),
        **model.given,
    }
    for node, segment in zip(nodes, segments, strict=True):
        generator = np.random.default_rng(0)
        feeds = {
            n: values[n] if n in values else repeated_array(model.tensors[n], generator)
            for n in segment.inputs
        }
        with OrtSession(source.extract(segment), settings) as session:
            yield node.name, OperatorProfile(_time_on_cpu(session, feeds))


def _integers(
    model: Model, names: Iterable[str], settings: SessionSettings
) -> dict[str, np.ndarray]:
    """Integers and booleans among tensors, from a run of the model.

    They may be divisors, shapes or indices, and an operator fails where they are made up.
    """
    kind_of = onnx.helper.tensor_dtype_to_np_dtype
    wanted = [
        name
        for name in dict.fromkeys(names)
        if kind_of(model.tensors[name].element_type).kind in "iub"
    ]
    if not wanted:
        return {}
    drawn = model_inputs(model, seed=0)
    inputs = [value.name for value in input_values(model.proto)]
    computed = [name for name in wanted if name not in inputs]
    values = {name: drawn[name] for name in wanted if name in inputs}
    if computed:
        part = model.source.part([n.name for n in model.proto.graph.node], inputs, computed)
        with OrtSession(part, settings) as session:
            found = session.run({name: drawn[name] for name in inputs}, computed)
        values |= dict(zip(computed, found, strict=True))
    return values


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
        properties["shared_memory_nbytes"],
        properties["registers"],
        properties["threads"],
        properties["multiprocessor_count"],
    )
