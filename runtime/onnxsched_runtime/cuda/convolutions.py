"""Convolutions with bias, sum and Relu in one kernel, channels last, by cuDNN.

ONNX Runtime fuses a Relu into a convolution only channels first, where kernels are slower.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

from onnxsched_runtime.convolution import FusedConvolution, Kernel
from onnxsched_runtime.cuda import cudnn
from onnxsched_runtime.cuda.binding import current_device
from onnxsched_runtime.cuda.cudnn import Descriptor
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError

_IMAGE, _FILTERS, _BIAS, _ADDED, _OUTPUT, _BETWEEN = 1, 2, 3, 4, 5, 6
"""Names of tensors; those between operations count on from the last."""
_TYPES: dict[int, int] = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 2}
_FLOAT = 0
_CROSS_CORRELATION = 1
_ADD, _RELU = 0, 100
_BY_DECISION_TREE, _BY_ALL_MEANS = 3, 2
_NONDETERMINISTIC = 4
_MOST_CONFIGS, _MOST_KNOBS, _MOST_NOTES = 24, 64, 16
_ALIGNMENT_NBYTES = 16
_MOST_WORKSPACE_NBYTES = 32 << 20


_using_handle = threading.RLock()
"""A handle is for one thread at a time, and several may load models."""


@functools.cache
def propose_kernels(what: FusedConvolution, device: Device) -> tuple[Kernel, ...]:
    """The kernels that cuDNN proposes, what it takes for the fastest first.

    Not all of them are supported; those that sum in no fixed order are left out.
    """
    found: dict[Kernel, None] = {}
    with _using_handle, current_device(device):
        graph = _operation_graph(what, device)
        for mode in (_BY_DECISION_TREE, _BY_ALL_MEANS):
            try:
                heuristics = Descriptor(
                    cudnn.HEURISTICS, {cudnn.HEURISTICS_OF: graph, cudnn.HEURISTICS_BY: mode}
                )
                configs = heuristics.get_descriptors(
                    cudnn.PROPOSED, cudnn.ENGINE_CONFIG, _MOST_CONFIGS
                )
            except OnnxschedError:  # this one knows nothing of such a graph
                continue
            described = (_described(config) for config in configs)
            found |= dict.fromkeys(kernel for kernel in described if kernel is not None)
    return tuple(found)


_kept: dict[tuple[FusedConvolution, Device, Kernel], FusedKernel] = {}
"""What has been built, some of it in a tenth of a second, for whoever needs it later."""


def keep_kernel(what: FusedConvolution, kernel: Kernel, built: FusedKernel) -> None:
    """Let `fused_kernel` have what has been built already."""
    _kept[what, built.device, kernel] = built


def fused_kernel(what: FusedConvolution, device: Device, wanted: Kernel | None) -> FusedKernel:
    """A kernel that computes a convolution: the one that is wanted, if cuDNN supports it.

    Raises:
        OnnxschedError: No kernel does.
    """
    refusal = "cuDNN proposes none"
    for kernel in _wanted_first(what, device, wanted):
        if (what, device, kernel) in _kept:
            return _kept[what, device, kernel]
        try:
            built = FusedKernel(what, kernel, device)
        except OnnxschedError as error:
            refusal = str(error).rstrip(".")
        else:
            keep_kernel(what, kernel, built)
            return built
    raise OnnxschedError(f"No kernel computes a convolution of {what.filters} ({refusal}).")


def _wanted_first(
    what: FusedConvolution, device: Device, wanted: Kernel | None
) -> Iterator[Kernel]:
    """That kernel, then what cuDNN proposes, which takes a while to find out."""
    if wanted is not None:
        yield wanted
    yield from propose_kernels(what, device)


class FusedKernel:
    """A kernel of cuDNN's for a convolution on a GPU; it lasts as long as the process."""

    def __init__(self, what: FusedConvolution, kernel: Kernel, device: Device) -> None:
        """Build it, which may compile.

        Raises:
            OnnxschedError: cuDNN does not support it, or it takes too much workspace.
        """
        self.device = device
        with _using_handle, current_device(device):
            self._plan = Descriptor(
                cudnn.PLAN,
                {
                    cudnn.PLAN_HANDLE: _handle(device).value,
                    cudnn.PLAN_CONFIG: _configuration(what, kernel, device),
                },
            )
        (self.workspace_nbytes,) = self._plan.get(cudnn.PLAN_WORKSPACE, 1)
        if self.workspace_nbytes > _MOST_WORKSPACE_NBYTES:
            raise OnnxschedError(f"It takes {self.workspace_nbytes} bytes of workspace.")

    def bind(self, places: Places) -> Descriptor:
        """Fix the addresses of its tensors."""
        named = {
            _IMAGE: places.image,
            _FILTERS: places.filters,
            _OUTPUT: places.output,
            _BIAS: places.bias,
            _ADDED: places.added,
        }
        given = {name: address for name, address in named.items() if address is not None}
        return Descriptor(
            cudnn.VARIANT_PACK,
            {
                cudnn.NAMES: list(given),
                cudnn.ADDRESSES: list(given.values()),
                cudnn.WORKSPACE: places.workspace,
            },
        )

    def launch(self, bound: Descriptor, stream: Stream) -> None:
        """Launch it on a stream.

        Raises:
            OnnxschedError: cuDNN refuses.
        """
        handle = _handle(self.device)
        with _using_handle, current_device(self.device):
            cudnn.call("cudnnSetStream", handle, stream.handle)
            cudnn.call("cudnnBackendExecute", handle, self._plan.native, bound.native)


@dataclass(frozen=True, slots=True)
class Places:
    """The addresses of a convolution's tensors; filters lie channels last, like images."""

    image: int
    filters: int
    output: int
    bias: int | None
    added: int | None
    workspace: int


@functools.cache
def _handle(device: Device) -> ctypes.c_void_p:
    """The handle of cuDNN on a GPU, one for the process: a launch sets its stream."""
    handle = ctypes.c_void_p()
    with current_device(device):
        cudnn.call("cudnnCreate", ctypes.byref(handle))
    return handle


def _configuration(what: FusedConvolution, kernel: Kernel, device: Device) -> Descriptor:
    """A kernel as cuDNN takes it."""
    (number,), *knobs = kernel
    engine = Descriptor(
        cudnn.ENGINE,
        {cudnn.ENGINE_GRAPH: _operation_graph(what, device), cudnn.ENGINE_NUMBER: number},
    )
    values: dict[cudnn.Attribute, Any] = {cudnn.CONFIG_ENGINE: engine}
    if knobs:
        values[cudnn.CONFIG_KNOBS] = [
            Descriptor(cudnn.KNOB_CHOICE, {cudnn.KNOB: knob, cudnn.KNOB_VALUE: value})
            for knob, value in knobs
        ]
    return Descriptor(cudnn.ENGINE_CONFIG, values)


def _described(config: Descriptor) -> Kernel | None:
    """What a configuration is known by; None for one that sums in no fixed order."""
    (engine,) = config.get_descriptors(cudnn.CONFIG_ENGINE, cudnn.ENGINE, 1)
    if _NONDETERMINISTIC in engine.get(cudnn.ENGINE_NOTES, _MOST_NOTES):
        return None
    choices = config.get_descriptors(cudnn.CONFIG_KNOBS, cudnn.KNOB_CHOICE, _MOST_KNOBS)
    knobs = [(*c.get(cudnn.KNOB, 1), *c.get(cudnn.KNOB_VALUE, 1)) for c in choices]
    return (tuple(engine.get(cudnn.ENGINE_NUMBER, 1)), *sorted(knobs))


@functools.cache
def _operation_graph(what: FusedConvolution, device: Device) -> Descriptor:
    """What is computed, as cuDNN takes it: a convolution, a sum, a bias, a Relu."""
    steps: list[tuple[int, Descriptor | None]] = []
    if what.adds:
        steps.append((_ADD, _tensor(_ADDED, what.output, what)))
    if what.has_bias:
        steps.append((_ADD, _tensor(_BIAS, (1, what.output[1], 1, 1), what)))
    if what.is_rectified:
        steps.append((_RELU, None))
    results = [_tensor(_BETWEEN + n, what.output) for n in range(len(steps))]
    results.append(_tensor(_OUTPUT, what.output, what))
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
    return Descriptor(
        cudnn.OPERATION_GRAPH,
        {cudnn.GRAPH_HANDLE: _handle(device).value, cudnn.OPERATIONS: operations},
    )


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
            cudnn.FILTERS: _tensor(_FILTERS, what.filters, what),
            cudnn.IMAGE: _tensor(_IMAGE, what.image, what),
            cudnn.CONVOLVED: result,
            cudnn.CONVOLVED_TIMES: 1.0,
            cudnn.KEPT_TIMES: 0.0,
        },
    )


def _tensor(name: int, shape: Sequence[int], of: FusedConvolution | None = None) -> Descriptor:
    """A tensor of a convolution; one between operations, in float32, if none is given."""
    _, channels, height, width = shape
    return Descriptor(
        cudnn.TENSOR,
        {
            cudnn.ELEMENT_TYPE: _FLOAT if of is None else _TYPES[of.element_type],
            cudnn.SHAPE: shape,
            cudnn.TENSOR_STRIDES: (height * width * channels, 1, width * channels, channels),
            cudnn.NAME: name,
            cudnn.ALIGNMENT: _ALIGNMENT_NBYTES,
            cudnn.IS_VIRTUAL: of is None,
        },
    )
