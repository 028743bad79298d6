"""A model in torch as an arm of the benchmark suite: eager, in a CUDA graph, or compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx
import torch

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from tools.torch_peer import torch_model

_SETTLING_COUNT = 3
"""Calls before a capture: cuDNN chooses its algorithms in the first, allocators settle next."""


@dataclass(frozen=True)
class TorchSettings:
    """How torch runs the model."""

    what: str
    compile_mode: str | None = None
    """The mode of `torch.compile`; None for eager mode."""
    is_captured: bool = False
    """Whether we capture it into one CUDA graph; eager and reduce-overhead are run as they are."""
    is_channels_last: bool = False
    is_frozen: bool = False
    """Let the compiler fold the weights: convolutions then take up their normalization."""


class TorchArm:
    """A torch module on fixed inputs."""

    def __init__(
        self,
        model: onnx.ModelProto,
        settings: TorchSettings,
        device: Device,
        feeds: Mapping[str, np.ndarray],
    ) -> None:
        """Build the module, compile it if asked for, run it and capture it.

        Raises:
            ModelError: The model holds an operator that is not supported.
            DeviceError: There is no such device.
        """
        allow_tf32()
        self._resources = ExitStack()
        self.stream: cuda.Stream | None = None
        self.compile_s: float | None = None
        self._graph: Any = None
        self._run: Any = None
        try:
            self._resources.enter_context(torch.no_grad())
            if device.kind == "cuda":
                self.stream = self._resources.enter_context(cuda.Stream(device))
                self._resources.enter_context(_current(self.stream))
            self._open(model, settings, device, feeds)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        model: onnx.ModelProto,
        settings: TorchSettings,
        device: Device,
        feeds: Mapping[str, np.ndarray],
    ) -> None:
        peer = torch_model(model)
        layout = torch.channels_last if settings.is_channels_last else torch.contiguous_format
        module: Any = peer.module.to(str(device))
        if settings.is_channels_last:
            module = module.to(memory_format=layout)
        self._inputs = [_input(feeds[name], device, layout) for name in peer.inputs]
        self._run = module
        if settings.compile_mode is not None:
            self._compile(module, settings, device)
        for _ in range(_SETTLING_COUNT):
            self.launch()
        if settings.is_captured and device.kind == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device.index)):
                self._captured = self._run(*self._inputs)
            self._graph = graph

    def _compile(self, module: Any, settings: TorchSettings, device: Device) -> None:
        from torch._inductor import config

        self._resources.enter_context(config.patch(freezing=settings.is_frozen))
        start = time.monotonic()
        compiled = torch.compile(module, mode=settings.compile_mode, fullgraph=True, dynamic=False)
        self._run = compiled
        if settings.compile_mode == "reduce-overhead":
            self._run = _each_a_step(compiled)
        self._run(*self._inputs)
        if device.kind == "cuda":
            cuda.synchronize(device)
        self.compile_s = time.monotonic() - start

    def launch(self) -> None:
        """Run once, on the arm's stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run(*self._inputs)

    def outputs(self) -> list[np.ndarray]:
        """The outputs for the feeds: of a launch, where it is captured."""
        if self._graph is not None:
            self._graph.replay()
            found = self._captured
        else:
            found = self._run(*self._inputs)
        if self.stream is not None:
            self.stream.synchronize()
        return [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in found]

    def close(self) -> None:
        """Free the graph, the module and the stream."""
        if self.stream is not None:
            cuda.synchronize(self.stream.device)
        self._graph = self._captured = None
        self._run = None
        self._inputs = []
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def allow_tf32() -> None:
    """Let torch multiply in TF32 and choose convolutions by measuring them."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def _input(value: np.ndarray, device: Device, layout: torch.memory_format) -> torch.Tensor:
    tensor = torch.from_numpy(value).to(str(device))
    return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor


def _current(stream: cuda.Stream) -> Any:
    """Let torch launch on a stream of ours."""
    module: Any = torch.cuda  # not typed
    return module.stream(module.ExternalStream(stream.handle, stream.device.index))


def _each_a_step(compiled: Any) -> Callable[..., Any]:
    """What marks each call as a new step: the outputs of the one before may be overwritten."""
    compiler: Any = torch.compiler  # not typed

    def run(*inputs: Any) -> Any:
        compiler.cudagraph_mark_step_begin()
        return compiled(*inputs)

    return run
