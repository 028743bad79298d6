"""Which of cuDNN's kernels is the fastest for a convolution or a pool, measured."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate

import numpy as np
import onnx

from onnxsched_runtime.cuda.buffers import DeviceMemory
from onnxsched_runtime.cuda.fused_kernels import (
    FusedKernel,
    build_kernel,
    keep_kernel,
    propose_kernels,
)
from onnxsched_runtime.cuda.graphs import Graph
from onnxsched_runtime.cuda.operations import Places
from onnxsched_runtime.cuda.plain_pools import PlainPool
from onnxsched_runtime.cuda.streams import graph_stream, time_launches_us
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.kernels import Computed, FusedConvolution, Kernel, Pool
from onnxsched_runtime.tensor import TensorType

_TRIED_COUNT = 8
"""For grouped convolutions cuDNN's first kernel was the fastest of each that was measured, and
others take long to compile."""
_SAMPLE_COUNT, _REPEAT_COUNT = 5, 10
_ALIGNMENT_NBYTES = 256
_DRAWN_COUNT = 1 << 20
_HOPELESS = 2.0
"""Nothing so much slower in the first sample needs more; some take milliseconds."""
_CLEARLY = 0.97
"""What is chosen over an earlier one is faster by more than noise."""


@functools.cache
def fastest_kernel(what: Computed, device: Device) -> Kernel | None:
    """The fastest of those that cuDNN proposes first; None if it has none, or no room to try any.

    Measured once a process.
    """
    best: tuple[float, Kernel, FusedKernel | PlainPool] | None = None
    tried = 0
    with ExitStack() as stack:
        try:
            places = stack.enter_context(_tensors(what, device))
        except OnnxschedError:
            return None
        for kernel in propose_kernels(what, device):
            if tried == (1 if _is_grouped(what) else _TRIED_COUNT):
                break
            most_us = math.inf if best is None else _HOPELESS * best[0]
            try:
                built = build_kernel(what, kernel, device)
                us = _time_us(built, places, most_us)
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


def _is_grouped(what: Computed) -> bool:
    return isinstance(what, FusedConvolution) and what.filters[1] < what.image[1]


def _time_us(kernel: FusedKernel | PlainPool, places: Places, most_us: float) -> float:
    """The time of a kernel, roughly where it is more than anyone wants to know."""
    device = kernel.device
    with (
        DeviceMemory(kernel.workspace_nbytes, device) as workspace,
        graph_stream(device) as stream,
    ):
        launch = kernel.bind(replace(places, workspace=workspace.pointer))
        launch(stream)
        stream.synchronize()

        def launch_repeatedly() -> None:
            for _ in range(_REPEAT_COUNT):
                launch(stream)

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


@contextmanager
def _tensors(what: Computed, device: Device) -> Iterator[Places]:
    """Memory for what a kernel reads and writes, with numbers: zeros may take another time.

    Raises:
        OnnxschedError: There is no room for them.
    """
    if isinstance(what, Pool):
        filters, has_bias, adds = None, False, False
    else:
        filters, has_bias, adds = what.filters, what.has_bias, what.adds
    shapes = (what.image, filters or (0,), what.output, (what.output[1],), what.output)
    sizes = [TensorType(what.element_type, shape).nbytes for shape in shapes]
    starts = list(accumulate((-(-n // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES for n in sizes),
                             initial=0))  # fmt: skip
    with DeviceMemory(starts[-1], device) as memory:
        for start, nbytes in zip(starts, sizes[:2], strict=False):
            memory.repeat(_drawn(what.element_type), start, nbytes)
        image, weights, output, bias, added, _ = (memory.pointer + start for start in starts)
        yield Places(
            image,
            weights if filters else None,
            output,
            bias if has_bias else None,
            added if adds else None,
            workspace=0,
        )


@functools.cache
def _drawn(element_type: int) -> np.ndarray:
    """Random numbers, to be repeated: an image may have a hundred million."""
    drawn = np.random.default_rng(0).standard_normal(_DRAWN_COUNT, np.float32)
    return drawn.astype(onnx.helper.tensor_dtype_to_np_dtype(element_type))
