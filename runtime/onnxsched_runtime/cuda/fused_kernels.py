"""Kernels of cuDNN that are launched without a session: proposed, built, bound, launched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from onnxsched_runtime.cuda import cudnn
from onnxsched_runtime.cuda.binding import current_device
from onnxsched_runtime.cuda.cudnn import Descriptor
from onnxsched_runtime.cuda.operations import (
    ADDED,
    BIAS,
    FILTERS,
    IMAGE,
    OUTPUT,
    Launch,
    Places,
    handle_on,
    operation_graph,
    using_handle,
)
from onnxsched_runtime.cuda.plain_pools import PlainPool
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.kernels import PLAIN, Computed, Kernel, Pool

_BY_DECISION_TREE, _BY_ALL_MEANS = 3, 2
_NONDETERMINISTIC = 4
_MOST_CONFIGS, _MOST_KNOBS, _MOST_NOTES = 24, 64, 16
_MOST_WORKSPACE_NBYTES = 32 << 20


@functools.cache
def propose_kernels(what: Computed, device: Device) -> tuple[Kernel, ...]:
    """The kernels that cuDNN proposes, what it takes for the fastest first.

    Not all of them are supported; those that sum in no fixed order are left out. Of pools the
    plain one is the first: what ONNX Runtime launches, for most of them the fastest.
    """
    found: dict[Kernel, None] = dict.fromkeys([PLAIN] if isinstance(what, Pool) else [])
    with using_handle, current_device(device):
        for mode in (_BY_DECISION_TREE, _BY_ALL_MEANS):
            try:
                configs = _proposed(what, device, mode)
            except OnnxschedError:  # this one knows nothing of such a graph
                continue
            described = (_described(config) for config in configs)
            found |= dict.fromkeys(kernel for kernel in described if kernel is not None)
    return tuple(found)


def _proposed(what: Computed, device: Device, mode: int) -> list[Descriptor]:
    graph = operation_graph(what, device)
    heuristics = Descriptor(
        cudnn.HEURISTICS, {cudnn.HEURISTICS_OF: graph, cudnn.HEURISTICS_BY: mode}
    )
    return heuristics.get_descriptors(cudnn.PROPOSED, cudnn.ENGINE_CONFIG, _MOST_CONFIGS)


_kept: dict[tuple[Computed, Device, Kernel], FusedKernel | PlainPool] = {}
"""What has been built, some of it in a tenth of a second, for whoever needs it later."""


def keep_kernel(what: Computed, kernel: Kernel, built: FusedKernel | PlainPool) -> None:
    """Let `fused_kernel` have what has been built already."""
    _kept[what, built.device, kernel] = built


def fused_kernel(what: Computed, device: Device, wanted: Kernel | None) -> FusedKernel | PlainPool:
    """A kernel that computes something: the one that is wanted, if cuDNN supports it.

    Raises:
        OnnxschedError: No kernel does.
    """
    refusal = "cuDNN proposes none"
    for kernel in _wanted_first(what, device, wanted):
        if (what, device, kernel) in _kept:
            return _kept[what, device, kernel]
        try:
            built = build_kernel(what, kernel, device)
        except OnnxschedError as error:
            refusal = str(error).rstrip(".")
        else:
            keep_kernel(what, kernel, built)
            return built
    raise OnnxschedError(f"No kernel computes {what} ({refusal}).")


def _wanted_first(what: Computed, device: Device, wanted: Kernel | None) -> Iterator[Kernel]:
    """That kernel, then what cuDNN proposes, which takes a while to find out."""
    if wanted is not None:
        yield wanted
    yield from propose_kernels(what, device)


def build_kernel(what: Computed, kernel: Kernel, device: Device) -> FusedKernel | PlainPool:
    """Build a kernel, which may compile.

    Raises:
        OnnxschedError: cuDNN does not support it, or it takes too much workspace.
    """
    if kernel == PLAIN and isinstance(what, Pool):
        return PlainPool(what, device)
    return FusedKernel(what, kernel, device)


class FusedKernel:
    """A kernel of cuDNN's graph API on a GPU; it lasts as long as the process."""

    def __init__(self, what: Computed, kernel: Kernel, device: Device) -> None:
        """Build it, which may compile.

        Raises:
            OnnxschedError: cuDNN does not support it, or it takes too much workspace.
        """
        self.device = device
        with using_handle, current_device(device):
            self._plan = Descriptor(
                cudnn.PLAN,
                {
                    cudnn.PLAN_HANDLE: handle_on(device).value,
                    cudnn.PLAN_CONFIG: _configuration(what, kernel, device),
                },
            )
        (self.workspace_nbytes,) = self._plan.get(cudnn.PLAN_WORKSPACE, 1)
        if self.workspace_nbytes > _MOST_WORKSPACE_NBYTES:
            raise OnnxschedError(f"It takes {self.workspace_nbytes} bytes of workspace.")

    def bind(self, places: Places) -> Launch:
        """What launches it on fixed addresses; it raises `OnnxschedError` where cuDNN refuses."""
        named = {
            IMAGE: places.image,
            FILTERS: places.filters,
            OUTPUT: places.output,
            BIAS: places.bias,
            ADDED: places.added,
        }
        given = {name: address for name, address in named.items() if address is not None}
        bound = Descriptor(
            cudnn.VARIANT_PACK,
            {
                cudnn.NAMES: list(given),
                cudnn.ADDRESSES: list(given.values()),
                cudnn.WORKSPACE: places.workspace,
            },
        )
        handle = handle_on(self.device)

        def launch(stream: Stream) -> None:
            with using_handle, current_device(self.device):
                cudnn.call("cudnnSetStream", handle, stream.handle)
                cudnn.call("cudnnBackendExecute", handle, self._plan.native, bound.native)

        return launch


def _configuration(what: Computed, kernel: Kernel, device: Device) -> Descriptor:
    """A kernel as cuDNN takes it."""
    (number,), *knobs = kernel
    engine = Descriptor(
        cudnn.ENGINE,
        {cudnn.ENGINE_GRAPH: operation_graph(what, device), cudnn.ENGINE_NUMBER: number},
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
