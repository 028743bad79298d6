"""Executors run fused convolutions beside sessions, on fakes: the same numbers, weights once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched.contraction import contract_chains
from onnxsched.loading import Model, graph_from_model
from onnxsched.schedule import Schedule, Slot
from onnxsched.trial import TrialRunner
from onnxsched_runtime import cuda, execution
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.execution import lowered_source
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.fused import fused_nodes
from onnxsched_runtime.fusing import fused
from onnxsched_runtime.kernels import Kernel
from onnxsched_runtime.moving import moved
from onnxsched_runtime.plan import ExecutionPlan, Operation, Run, check_plan
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.pooling import pooled
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import Variant
from support import fake_cuda
from support.fused import FUSES, Lowered, feeds_for, lowered_models, outputs_of
from support.models import Array
from support.optimizing import assert_close

GPU = Device("cuda")
CAPTURES: tuple[Capture, ...] = ("whole", "ort", "none")


@contextmanager
def fakes() -> Iterator[pytest.MonkeyPatch]:
    """CUDA replaced, as often as Hypothesis wants."""
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.install(patch)
        yield patch


def round_robin(source: ModelSource, *placements: Placement) -> dict[str, Placement]:
    """The nodes in their order, on the placements in turn."""
    nodes = source.model.graph.node
    return {n.name: placements[i % len(placements)] for i, n in enumerate(nodes)}


@contextmanager
def opened(
    source: ModelSource, placements: Mapping[str, Placement], capture: Capture = "whole"
) -> Iterator[StreamExecutor]:
    plan = plan_model(source.model, placements, {})
    with StreamExecutor(source, plan, capture) as executor:
        assert (executor.capture, executor.refusal) == (capture, None)
        yield executor


def assert_right(executor: StreamExecutor, source: ModelSource, seed: int = 1) -> None:
    """Check a run against what is computed node by node."""
    feeds = feeds_for(source, seed)
    names = [value.name for value in source.model.graph.output]
    assert_close(executor.run(feeds, names), outputs_of(source, feeds), 1e-5)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), source=lowered_models(5, on_cpu=True), capture=st.sampled_from(CAPTURES))
def test_fused_models_compute_the_same_on_any_streams_however_they_are_captured(
    data: DataObject, source: ModelSource, capture: Capture
) -> None:
    after = moved(pooled(fused(source)))
    streams = st.integers(0, 2).map(lambda stream: Placement(GPU, stream))
    placements = {node.name: data.draw(streams) for node in after.model.graph.node}
    with fakes(), opened(after, placements, capture) as executor:
        for seed in range(2):
            assert_right(executor, after, seed)


def inception() -> ModelSource:
    """Convolutions side by side, between operators of sessions."""
    net = Lowered((1, 4, 4, 4))
    start = net.add("Relu", ["x"])
    left = net.add("Relu", [net.conv(start, 4, 3)])
    right = net.add("Relu", [net.conv(net.conv(start, 8), 4, 3, bias=False)])
    middle = net.pool(net.pool(start), "AveragePool")
    joined = net.add("Concat", [left, middle, right], axis=3)
    total = net.add("Add", [net.conv(joined, 12), joined])
    return pooled(fused(net.source(net.reshape(net.add("Relu", [total]), 1, -1))))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("device_count", [1, 2])
def test_weights_are_uploaded_once_for_a_device(capture: Capture, device_count: int) -> None:
    net = Lowered((1, 4, 4, 4))
    first = net.conv("x", 4, 3)
    second = net.add("Conv", [first, *net.nodes[0].input[1:]], net.nodes[0].domain, pads=[1] * 4)
    source = fused(net.source(net.add("Relu", [second])))
    devices = [Device("cuda", index) for index in range(device_count)]
    uploads: list[int] = []
    upload = fake_cuda.FakeMemory.upload

    def counted(memory: fake_cuda.FakeMemory, array: np.ndarray, offset_nbytes: int) -> None:
        uploads.append(array.nbytes)
        upload(memory, array, offset_nbytes)

    placements = round_robin(source, *(Placement(device, 1) for device in devices))
    with fakes() as patch:
        patch.setattr(fake_cuda.FakeMemory, "upload", counted)
        with opened(source, placements, capture) as executor:
            once = {4 * 4 * 3 * 3 * 4: device_count, 4 * 4: device_count}
            assert Counter(uploads) == once
            assert_right(executor, source)


def test_a_model_with_fused_convolutions_is_one_launch() -> None:
    source = inception()
    placements = round_robin(source, Placement(GPU, 1), Placement(GPU, 2))
    with fakes(), opened(source, placements) as executor:
        assert executor.is_one_graph
        assert executor.graph_count == 1
        assert_right(executor, source)
        assert fake_cuda.FakeGraph.launches == 1


def test_the_kernel_that_was_measured_is_asked_for() -> None:
    source = inception()
    nodes = [*fused_nodes(source).values()]
    known: dict[Any, Kernel] = {nodes[0].what: ((47,), (3, 2)), nodes[2].what: ((1,),)}
    source = replace(source, kernels=known)
    with fakes(), opened(source, round_robin(source, Placement(GPU, 0))) as executor:
        wanted = Counter(fake_cuda.FakeKernel.wanted)
        assert wanted == Counter(known.get(node.what) for node in nodes)
        assert_right(executor, source)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_weight_that_sessions_share_lies_for_each_as_it_takes_it(capture: Capture) -> None:
    net = Lowered((1, 8, 8, 4))
    convolved = net.conv("x", 8, 8, pads=[4, 4, 3, 3])
    filters = net.nodes[0].input[1]
    square = net.reshape("x", 4, 8, 8)
    products = [net.add("MatMul", [read, filters]) for read in (square, net.add("Relu", [square]))]
    source = fused(net.source(convolved, *products))
    streams = zip(source.model.graph.node, (0, 1, 2, 1, 2), strict=True)
    placements = {node.name: Placement(GPU, stream) for node, stream in streams}
    with fakes(), opened(source, placements, capture) as executor:
        assert_right(executor, source)


def model_of(source: ModelSource) -> Model:
    """A lowered model as the optimizer holds it."""
    return Model(
        source.model,
        source.tensors,
        {},
        {"x": source.tensors["x"].shape or ()},
        source.model,
        source.variant,
        is_lowered=True,
    )


@settings(deadline=None, max_examples=12)
@given(data=st.data(), source=lowered_models(5, on_cpu=True))
def test_trials_of_fused_models_compute_the_same_by_every_schedule(
    data: DataObject, source: ModelSource
) -> None:
    model = model_of(moved(pooled(fused(source))))
    contraction = contract_chains(graph_from_model(model))
    launches: list[int] = []

    def launched(stream: object, launch: Any, count: int) -> tuple[float, ...]:
        launch()
        launches.append(count)
        return (1.0,) * count

    with fakes() as patch, TrialRunner(model, contraction, [GPU], ()) as trials:
        patch.setattr(cuda, "time_launches_us", launched)
        for _ in range(2):
            streams = [data.draw(st.integers(0, 2)) for _ in contraction.groups]
            slots = [Slot(v, Placement(GPU, stream)) for v, stream in enumerate(streams)]
            assert_trial_right(trials, model.source, Schedule(tuple(slots)))
    assert launches == [4, 8] * 2


@settings(deadline=None, max_examples=12)
@given(data=st.data(), source=lowered_models(6, on_cpu=True), device_count=st.integers(2, 3))
def test_trials_over_several_devices_compute_the_same_by_every_schedule(
    data: DataObject, source: ModelSource, device_count: int
) -> None:
    model = model_of(moved(pooled(fused(source))))
    contraction = contract_chains(graph_from_model(model), with_inputs=True)
    devices = [Device("cuda", number) for number in range(device_count)]

    def launched(stream: object, launch: Any, count: int) -> tuple[float, ...]:
        launch()
        return (2000.0,) * count

    with fakes() as patch, TrialRunner(model, contraction, devices, ()) as trials:
        patch.setattr(cuda, "time_launches_us", launched)
        for _ in range(3):
            places = st.builds(Placement, st.sampled_from(devices), st.integers(0, 1))
            slots = [Slot(v, data.draw(places)) for v in range(len(contraction.groups))]
            schedule = Schedule(tuple(slots))
            assert_valid(trials.plan(schedule), len(model.proto.graph.node))
            assert_trial_right(trials, model.source, schedule)


def assert_valid(plan: ExecutionPlan, node_count: int) -> None:
    """Check what is launched of a plan by the laws of plans, each segment as one operation."""
    number = {index: n for n, index in enumerate(plan.pieces[0].runs)}
    held = [name for i in number if not plan.is_copy(i) for name in plan.segments[i].nodes]
    assert len(held) == len(set(held)) == node_count
    segments = tuple(
        segment if plan.is_copy(index) else replace(segment, nodes=(f"segment {index}",))
        for index, segment in enumerate(plan.segments)
    )
    launched = tuple(segments[index] for index in number)
    steps = tuple(
        Run(number[step.segment]) if isinstance(step, Run) else step
        for step in plan.pieces[0].steps
    )
    written = {tensor for segment in launched for tensor in segment.outputs}
    read = {tensor for segment in launched for tensor in segment.inputs}
    reduced = replace(
        plan,
        segments=launched,
        pieces=(replace(plan.pieces[0], steps=steps),),
        inputs=tuple(read - written),
        outputs=(),
    )
    check_plan(
        reduced,
        [
            Operation(s.nodes[0], s.placement, s.inputs, s.outputs, None, s.is_fused)
            for s in launched
        ],
    )


def assert_trial_right(trials: TrialRunner, source: ModelSource, schedule: Schedule) -> None:
    """Measure a schedule, and check what its graph leaves in the buffers."""
    buffers = trials._runner.buffers
    main, *_ = trials._runner.streams.values()
    plan = trials.plan(schedule)
    launched = [plan.segments[index] for index in plan.pieces[0].runs]
    feeds: dict[str, Array] = feeds_for(source)
    written = {tensor for segment in launched for tensor in segment.outputs}
    for name in {t for segment in launched for t in segment.inputs} - written:
        buffers[name].fill(feeds[plan.original(name)], main)
    samples_us = trials.measure_us(schedule)
    assert samples_us in ((1.0,) * 12, (2000.0,) * 4)
    place = {plan.original(t): t for s in launched for t in s.outputs if s.nodes != (t,)}
    found = []
    for value in source.model.graph.output:
        buffers[place[value.name]].fetch(main)
        found.append(buffers[place[value.name]].staging.copy())
    assert_close(found, outputs_of(source, feeds), 1e-5)


def test_where_cudnn_has_no_kernel_sessions_run_all_convolutions() -> None:
    net = Lowered((1, 4, 4, 4))
    model = net.source(net.add("Relu", [net.conv("x", 4)])).model
    names = [node.name for node in model.graph.node]
    placements = dict.fromkeys(names, Placement(GPU, 1))
    annotation = Annotation(placements, {"x": TensorType(1, (1, 4, 4, 4))}, {}, FUSES)
    asked: list[Variant] = []

    def lowered(source: ModelSource, device: Device, custom_ops: Any) -> ModelSource:
        asked.append(source.variant)
        made = replace(net.source(net.nodes[-1].output[0]), variant=source.variant)
        return fused(made) if source.variant.fuses else made

    def refuse(*_: Any) -> None:
        raise OnnxschedError("cuDNN does not load (planted).")

    with fakes() as patch:
        patch.setattr(execution, "lower", lowered)
        assert lowered_source(model, annotation).variant == FUSES
        patch.setattr(cuda, "fused_kernel", refuse)
        found = lowered_source(model, annotation)
    assert not fused_nodes(found)
    assert found.variant == replace(FUSES, fuses=False, fuse_conv_bias=False)
    assert asked == [FUSES, FUSES, found.variant]
