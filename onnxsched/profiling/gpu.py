"""Run operators alone on a GPU: time, kernels, and whether they can be captured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx

from onnxsched.inputs import random_array
from onnxsched.loading import Model
from onnxsched.profile import KernelProfile, OperatorProfile
from onnxsched.profiling.kernels import kernels_by_range
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import CaptureError
from onnxsched_runtime.executors.segments import SegmentRunner
from onnxsched_runtime.model import is_fused, node_reads
from onnxsched_runtime.partition import assemble
from onnxsched_runtime.plan import Segment
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType

SAMPLE_COUNT = 9
"""Samples of each operator; the median is what scheduling uses."""
_REPEAT_COUNT = 10
"""Runs inside the CUDA graph of one sample, so that launching does not count."""
_DRAWN_COUNT = 1 << 20
_BATCH_COUNT = 32
"""Sessions alive at a time: each may hold tens of megabytes of workspace."""


def operator_segment(source: ModelSource, node: onnx.NodeProto, placement: Placement) -> Segment:
    """One operator as a segment of its own."""
    inputs = tuple(name for name in node_reads(node) if not source.is_weight(name))
    outputs = tuple(filter(None, node.output))
    return Segment((node.name,), placement, inputs, outputs, is_fused=is_fused(node))


def measure_on_gpu(
    model: Model,
    device: Device,
    nodes: Sequence[onnx.NodeProto],
    custom_ops: tuple[str, ...],
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, OperatorProfile]]:
    """Measure operators one after another, in topological order.

    Args:
        model: The model they are from.
        device: The GPU.
        nodes: The operators, none of them a host operator.
        custom_ops: Libraries of custom operators.
        announce: Told the name of each operator before it is captured: some of ORT's kernels
            end the process when that is not possible.

    Yields:
        The name of each operator and its measurements.
    """
    for start in range(0, len(nodes), _BATCH_COUNT):
        yield from _measure_batch(
            model, device, nodes[start : start + _BATCH_COUNT], custom_ops, announce
        )


def _measure_batch(
    model: Model,
    device: Device,
    nodes: Sequence[onnx.NodeProto],
    custom_ops: tuple[str, ...],
    announce: Callable[[str], None],
) -> Iterator[tuple[str, OperatorProfile]]:
    placement = Placement(device, 0)
    source = model.source
    segments = [operator_segment(source, node, placement) for node in nodes]
    inputs = tuple(dict.fromkeys(name for segment in segments for name in segment.inputs))
    plan = assemble(segments, inputs, ())
    runner = SegmentRunner(source, plan, custom_ops=custom_ops, in_place=False)
    try:
        stream = runner.streams[placement]
        for name in inputs:
            if model.tensors[name].nbytes:
                runner.buffers[name].repeat(_drawn(model.tensors[name].element_type))
        runner.prepare(plan.pieces[0])
        kernels = _kernels(runner, device)
        for index, node in enumerate(nodes):
            announce(node.name)
            samples_us, refusal = _time_run(runner.bound[index].launch, stream)
            yield node.name, OperatorProfile(samples_us, kernels.get(str(index), ()), refusal)
    finally:
        runner.close()


@functools.cache
def _drawn(element_type: int) -> np.ndarray:
    """Numbers for any tensor of a type, to be repeated: an image may have a hundred million."""
    return random_array(TensorType(element_type, (_DRAWN_COUNT,)), np.random.default_rng(0))


def _kernels(runner: SegmentRunner, device: Device) -> dict[str, tuple[KernelProfile, ...]]:
    def run_all() -> None:
        for index, bound in runner.bound.items():
            with cuda.named_range(str(index)):
                bound.launch()

    return kernels_by_range(cuda.kernel_trace(run_all, device))


def _time_run(
    launch: Callable[[], None], stream: cuda.Stream
) -> tuple[tuple[float, ...], str | None]:
    """Samples of one run's time, from graphs that hold many runs; and why not, if so."""

    def run_repeatedly() -> None:
        for _ in range(_REPEAT_COUNT):
            launch()

    try:
        graph = cuda.Graph.capture(stream, run_repeatedly)
    except CaptureError as error:
        samples = cuda.time_launches_us(stream, run_repeatedly, SAMPLE_COUNT)
        refusal: str | None = str(error)
    else:
        samples = cuda.time_launches_us(stream, lambda: graph.launch(stream), SAMPLE_COUNT)
        graph.close()
        refusal = None
    return tuple(max(sample / _REPEAT_COUNT, 1e-3) for sample in samples), refusal
