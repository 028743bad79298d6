"""Which of cuDNN's kernels is the fastest for a convolution, measured."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import onnx

from onnxsched_runtime.convolution import FusedConvolution, Kernel
from onnxsched_runtime.cuda.buffers import DeviceMemory
from onnxsched_runtime.cuda.convolutions import (
    FusedKernel,
    Places,
    keep_kernel,
    propose_kernels,
)
from onnxsched_runtime.cuda.graphs import Graph
from onnxsched_runtime.cuda.streams import graph_stream, time_launches_us
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.tensor import TensorType

_TRIED_COUNT = 8
"""For grouped convolutions cuDNN's first kernel was the fastest of each that was measured, and
others take long to compile."""
_SAMPLE_COUNT, _REPEAT_COUNT = 5, 10
_ALIGNMENT_NBYTES = 256
_HOPELESS = 2.0
"""Nothing so much slower in the first sample needs more; some take milliseconds."""
_CLEARLY = 0.97
"""What is chosen over an earlier one is faster by more than noise."""


@functools.cache
def fastest_kernel(what: FusedConvolution, device: Device) -> Kernel | None:
    """The fastest of those that cuDNN proposes first; None if it has none at all.

    Measured once a process.
    """
    best: tuple[float, Kernel, FusedKernel] | None = None
    tried = 0
    for kernel in propose_kernels(what, device):
        if tried == (_TRIED_COUNT if what.filters[1] == what.image[1] else 1):
            break
        most_us = math.inf if best is None else _HOPELESS * best[0]
        try:
            built = FusedKernel(what, kernel, device)
            us = _time_us(what, built, device, most_us)
        except OnnxschedError:
            continue
        tried += 1
        if best is None or us < _CLEARLY * best[0]:
            best = us, kernel, built
    if best is None:
        return None
    _, kernel, built = best
    keep_kernel(what, kernel, built)
    return kernel


def _time_us(what: FusedConvolution, kernel: FusedKernel, device: Device, most_us: float) -> float:
    """The time of a kernel, roughly where it is more than anyone wants to know."""
    starts = _starts(what)
    with (
        DeviceMemory(starts[-1] + kernel.workspace_nbytes, device) as memory,
        graph_stream(device) as stream,
    ):
        _fill(what, memory, starts)
        bound = kernel.bind(_places(what, memory, starts))
        kernel.launch(bound, stream)
        stream.synchronize()

        def launch_repeatedly() -> None:
            for _ in range(_REPEAT_COUNT):
                kernel.launch(bound, stream)

        graph = Graph.capture(stream, launch_repeatedly)

        def median_us(sample_count: int) -> float:
            samples = time_launches_us(
                stream, lambda: graph.launch(stream), sample_count, warm_up_count=1
            )
            return statistics.median(samples) / _REPEAT_COUNT

        try:
            first_us = median_us(1)
            return first_us if first_us > most_us else median_us(_SAMPLE_COUNT)
        finally:
            graph.close()


def _starts(what: FusedConvolution) -> list[int]:
    """Where image, filters, output, bias, summand and workspace begin, in bytes."""
    shapes = (what.image, what.filters, what.output, (what.output[1],), what.output)
    starts = [0]
    for shape in shapes:
        end = starts[-1] + TensorType(what.element_type, shape).nbytes
        starts.append(-(-end // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES)
    return starts


def _places(what: FusedConvolution, memory: DeviceMemory, starts: Sequence[int]) -> Places:
    image, filters, output, bias, added, workspace = (memory.pointer + start for start in starts)
    return Places(
        image,
        filters,
        output,
        bias if what.has_bias else None,
        added if what.adds else None,
        workspace,
    )


def _fill(what: FusedConvolution, memory: DeviceMemory, starts: Sequence[int]) -> None:
    """Numbers to multiply: zeros may take another time."""
    generator = np.random.default_rng(0)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(what.element_type)
    for shape, start in zip((what.image, what.filters), starts, strict=False):
        values = generator.standard_normal(math.prod(shape), np.float32)
        memory.upload(values.astype(dtype), start)
