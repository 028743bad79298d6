"""What cuDNN is asked to compute: graphs of its operations on images with channels last.

A convolution takes in a sum, a bias and a Relu, which ONNX Runtime fuses only channels first,
where kernels are slower.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import TensorProto

from onnxsched_runtime.cuda import cudnn
from onnxsched_runtime.cuda.binding import current_device
from onnxsched_runtime.cuda.cudnn import Descriptor
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.kernels import Computed, FusedConvolution, Pool

IMAGE, FILTERS, BIAS, ADDED, OUTPUT = 1, 2, 3, 4, 5
"""Names of tensors."""
_BETWEEN = 6
"""Those between operations count on from here."""
ELEMENT_TYPES: dict[int, int] = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 2}
"""cuDNN's numbers for those of ONNX."""
_FLOAT = 0
_CROSS_CORRELATION = 1
_ADD, _RELU = 0, 100
_AVERAGE_WITH_PADDING, _MAXIMUM, _AVERAGE = 2, 3, 4
_NOT_A_NUMBER_PASSES = 1
_PAD_WITH_ZEROS, _PAD_WITH_LOWEST = 0, 1
_ALIGNMENT_NBYTES = 16

using_handle = threading.RLock()
"""A handle is for one thread at a time, and several may load models."""


Launch = Callable[[Stream], None]
"""Launches a kernel on fixed addresses."""


@dataclass(frozen=True, slots=True)
class Places:
    """The addresses of the tensors of a kernel; filters lie channels last, like images."""

    image: int
    filters: int | None
    output: int
    bias: int | None
    added: int | None
    workspace: int


@functools.cache
def handle_on(device: Device) -> ctypes.c_void_p:
    """The handle of cuDNN on a GPU, one for the process: a launch sets its stream."""
    handle = ctypes.c_void_p()
    with current_device(device):
        cudnn.call("cudnnCreate", ctypes.byref(handle))
    return handle


@functools.cache
def operation_graph(what: Computed, device: Device) -> Descriptor:
    """What is computed, as cuDNN takes it.

    Raises:
        OnnxschedError: cuDNN knows no such operation.
    """
    operations = [_pooling(what)] if isinstance(what, Pool) else _convolution_and_more(what)
    return Descriptor(
        cudnn.OPERATION_GRAPH,
        {cudnn.GRAPH_HANDLE: handle_on(device).value, cudnn.OPERATIONS: operations},
    )


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The distances of an image's numbers in memory, its channels last, in ONNX's order."""
    _, channels, height, width = shape
    return (height * width * channels, 1, width * channels, channels)


def _pooling(what: Pool) -> Descriptor:
    rank = len(what.window)
    average = _AVERAGE_WITH_PADDING if what.counts_padding else _AVERAGE
    form = Descriptor(
        cudnn.RESAMPLE,
        {
            cudnn.RESAMPLES_BY: average if what.averages else _MAXIMUM,
            cudnn.RESAMPLES_IN: _FLOAT,
            cudnn.RESAMPLED_NAN: _NOT_A_NUMBER_PASSES,
            cudnn.RESAMPLED_PADDING: _PAD_WITH_ZEROS if what.averages else _PAD_WITH_LOWEST,
            cudnn.RESAMPLED_RANK: rank,
            cudnn.WINDOW: what.window,
            cudnn.WINDOW_STRIDES: what.strides,
            cudnn.WINDOW_BEGINS: what.pads[:rank],
            cudnn.WINDOW_ENDS: what.pads[rank:],
        },
    )
    return Descriptor(
        cudnn.RESAMPLE_FORWARD,
        {
            cudnn.RESAMPLE_FORM: form,
            cudnn.RESAMPLED: _tensor(IMAGE, what.image, what),
            cudnn.RESAMPLE_RESULT: _tensor(OUTPUT, what.output, what),
            cudnn.RESAMPLED_TIMES: 1.0,
            cudnn.RESULT_KEPT_TIMES: 0.0,
        },
    )


def _convolution_and_more(what: FusedConvolution) -> list[Descriptor]:
    """A convolution, then a sum, a bias, a Relu."""
    steps: list[tuple[int, Descriptor | None]] = []
    if what.adds:
        steps.append((_ADD, _tensor(ADDED, what.output, what)))
    if what.has_bias:
        steps.append((_ADD, _tensor(BIAS, (1, what.output[1], 1, 1), what)))
    if what.is_rectified:
        steps.append((_RELU, None))
    results = [_tensor(_BETWEEN + n, what.output) for n in range(len(steps))]
    results.append(_tensor(OUTPUT, what.output, what))
    operations = [_convolution(what, results[0])]
    for (mode, other), read, written in zip(steps, results, results[1:], strict=False):
        does = Descriptor(
            cudnn.POINTWISE,
            {cudnn.POINTWISE_DOES: mode, cudnn.POINTWISE_PRECISION: _FLOAT},
        )
        values = {cudnn.DOES: does, cudnn.READS: read, cudnn.WRITES: written}
        if other is not None:
            values[cudnn.READS_TOO] = other
        operations.append(Descriptor(cudnn.POINTWISE_OPERATION, values))
    return operations


def _convolution(what: FusedConvolution, result: Descriptor) -> Descriptor:
    rank = len(what.strides)
    form = Descriptor(
        cudnn.CONVOLUTION,
        {
            cudnn.SPATIAL_RANK: rank,
            cudnn.COMPUTES_IN: _FLOAT,
            cudnn.CONVOLVES_BY: _CROSS_CORRELATION,
            cudnn.DILATIONS: what.dilations,
            cudnn.STRIDES: what.strides,
            cudnn.PADS_BEFORE: what.pads[:rank],
            cudnn.PADS_BEHIND: what.pads[rank:],
        },
    )
    return Descriptor(
        cudnn.CONVOLUTION_FORWARD,
        {
            cudnn.FORM: form,
            cudnn.FILTERS: _tensor(FILTERS, what.filters, what),
            cudnn.IMAGE: _tensor(IMAGE, what.image, what),
            cudnn.CONVOLVED: result,
            cudnn.CONVOLVED_TIMES: 1.0,
            cudnn.KEPT_TIMES: 0.0,
        },
    )


def _tensor(name: int, shape: Sequence[int], of: Computed | None = None) -> Descriptor:
    """A tensor of what is computed; one between operations, in float32, if that is not given."""
    return Descriptor(
        cudnn.TENSOR,
        {
            cudnn.ELEMENT_TYPE: _FLOAT if of is None else ELEMENT_TYPES[of.element_type],
            cudnn.SHAPE: shape,
            cudnn.TENSOR_STRIDES: strides_of(shape),
            cudnn.NAME: name,
            cudnn.ALIGNMENT: _ALIGNMENT_NBYTES,
            cudnn.IS_VIRTUAL: of is None,
        },
    )
