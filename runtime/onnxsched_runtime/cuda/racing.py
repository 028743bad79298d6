"""Which of cuDNN's kernels is the fastest for a convolution, measured."""

from __future__ import annotations

import functools
import math
import statistics

import numpy as np
import onnx

from onnxsched_runtime.convolution import FusedConvolution, Kernel
from onnxsched_runtime.cuda.buffers import DeviceMemory
from onnxsched_runtime.cuda.convolutions import FusedKernel, Places, propose_kernels
from onnxsched_runtime.cuda.graphs import Graph
from onnxsched_runtime.cuda.streams import graph_stream, time_launches_us
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.tensor import TensorType

_TRIED_COUNT = 4
"""cuDNN's order is a good guess: what comes later is meant to work, not to be fast. For grouped
convolutions its first kernel was the fastest of each that was measured, and others take long to
compile."""
_SAMPLE_COUNT, _REPEAT_COUNT = 5, 10
_CLEARLY = 0.97
"""What is chosen over an earlier one is faster by more than noise."""


@functools.cache
def fastest_kernel(what: FusedConvolution, device: Device) -> Kernel | None:
    """The fastest of the first few that cuDNN proposes; None if it has none at all.

    Measured once a process.
    """
    best: tuple[float, Kernel] | None = None
    tried = 0
    for kernel in propose_kernels(what, device):
        if tried == (_TRIED_COUNT if what.filters[1] == what.image[1] else 1):
            break
        try:
            us = _time_us(what, FusedKernel(what, kernel, device), device)
        except OnnxschedError:
            continue
        tried += 1
        if best is None or us < _CLEARLY * best[0]:
            best = us, kernel
    return None if best is None else best[1]


def _time_us(what: FusedConvolution, kernel: FusedKernel, device: Device) -> float:
    shapes = (what.image, what.filters, what.output, (what.output[1],), what.output)
    sizes = [TensorType(what.element_type, shape).nbytes for shape in shapes]
    starts = [0]
    for nbytes in sizes:
        starts.append(-(-(starts[-1] + nbytes) // 256) * 256)
    with (
        DeviceMemory(starts[-1] + kernel.workspace_nbytes, device) as memory,
        graph_stream(device) as stream,
    ):
        image, filters, output, bias, added, workspace = (memory.pointer + s for s in starts)
        places = Places(
            image,
            filters,
            output,
            bias if what.has_bias else None,
            added if what.adds else None,
            workspace,
        )
        generator = np.random.default_rng(0)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(what.element_type)
        for shape, start in ((what.image, starts[0]), (what.filters, starts[1])):
            values = generator.standard_normal(math.prod(shape), np.float32)
            memory.upload(values.astype(dtype), start)
        bound = kernel.bind(places)
        kernel.launch(bound, stream)
        stream.synchronize()

        def launch_repeatedly() -> None:
            for _ in range(_REPEAT_COUNT):
                kernel.launch(bound, stream)

        graph = Graph.capture(stream, launch_repeatedly)
        try:
            samples = time_launches_us(stream, lambda: graph.launch(stream), _SAMPLE_COUNT)
        finally:
            graph.close()
    return statistics.median(samples)
