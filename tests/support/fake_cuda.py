"""CUDA without a GPU: what is launched runs at once, in the order in which it is issued.

Good for what executors do with streams, graphs and buffers; not for whether events are enough,
which `check_plan` judges, nor for anything that only a GPU can show.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import pytest

from onnxsched_runtime import cuda, execution, load
from onnxsched_runtime.arena import packed
from onnxsched_runtime.cuda import buffers, tensors
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError
from onnxsched_runtime.executors import runner
from onnxsched_runtime.kernels import Computed, Kernel, Pool
from onnxsched_runtime.moves import Cut, Reordered
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.wiring import ChainNode, WiredNode
from support.fused import convolved, pooled_windows


class FakeStream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = id(self)
        self.is_open = True

    def record(self) -> FakeStream:
        return self

    def wait(self, event: FakeStream) -> None:
        assert event.is_open

    def wait_for_caller(self, device: Device) -> None:
        assert self.is_open

    release_to_caller = wait_for_caller

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeMemory(cuda.DeviceMemory):
    """A block of host memory."""

    live: ClassVar[dict[int, int]] = {}
    """The bytes of each block that is not closed, by where it begins."""

    def __init__(self, nbytes: int, device: Device) -> None:
        self.nbytes = nbytes
        self._bytes = np.zeros(nbytes + 1, np.uint8)
        self.pointer = self._bytes.ctypes.data
        self.live[self.pointer] = nbytes

    def repeat(self, block: np.ndarray, offset_nbytes: int, nbytes: int) -> None:
        assert offset_nbytes + nbytes <= self.nbytes
        for start in range(0, nbytes, block.nbytes):
            count = min(block.nbytes, nbytes - start)
            ctypes.memmove(self.pointer + offset_nbytes + start, block.ctypes.data, count)

    def close(self) -> None:
        self.live.pop(self.pointer, None)
        self.pointer = 0

    @classmethod
    def holds(cls, start: int, nbytes: int) -> bool:
        """Whether these bytes lie in one block."""
        return any(
            first <= start and start + nbytes <= first + count for first, count in cls.live.items()
        )


class FakeBuffer(cuda.Buffer):
    """A real buffer in host memory, copied at once."""

    def __init__(self, kind: TensorType, device: Device, pointer: int) -> None:
        super().__init__(kind, Device("cpu"), pointer)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element_type)
        self._staging = np.zeros(kind.shape or (), dtype)

    @property
    def staging(self) -> np.ndarray:
        return self._staging

    def clear(self, stream: Any) -> None:
        assert stream.is_open
        ctypes.memset(self.pointer, 0, self.kind.nbytes)

    def _copy(
        self, target: int, source: int, stream: Any, start: int = 0, end: int | None = None
    ) -> None:
        assert stream.is_open
        nbytes = (self.kind.nbytes if end is None else end) - start
        ctypes.memmove(target + start, source + start, nbytes)


class FakeChain:
    """Holds what was issued, and claims to have seen its marks."""

    workspace_nbytes = 0

    def __init__(self, issue: Callable[[], None], mark_count: int) -> None:
        self.issue = issue
        nodes = [ChainNode(())]
        for mark in range(1, mark_count + 1):
            nodes += [ChainNode((len(nodes) - 1,), mark, False), ChainNode((len(nodes),))]
        self.nodes = tuple(nodes)

    def reaches_only(self, places: Iterable[tuple[int, int]]) -> bool:
        """A run of these needs its session."""
        return False

    @classmethod
    def capture(
        cls, stream: FakeStream, issue: Callable[[], None], marks: Mapping[int, int] | None = None
    ) -> FakeChain:
        assert stream.is_open
        FakeGraph.refuse()
        return cls(issue, len(marks or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class FakeKernel:
    """A fused convolution or pool, computed on the host memory that it is bound to."""

    wanted: ClassVar[list[Kernel | None]] = []
    """The kernel that was asked for, by each that was made."""

    def __init__(self, what: Computed, device: Device, wanted: Kernel | None) -> None:
        self._what = what
        self.device = device
        self.workspace_nbytes = 64 * (1 + what.output[1])
        FakeKernel.wanted.append(wanted)

    def bind(self, places: cuda.Places) -> Callable[[FakeStream], None]:
        what = self._what
        there = [getattr(places, name) is not None for name in ("filters", "bias", "added")]
        if isinstance(what, Pool):
            assert there == [False] * 3
        else:
            assert there == [True, what.has_bias, what.adds]

        def launch(stream: FakeStream) -> None:
            """Compute; what lies in the workspace is lost."""
            assert stream.is_open
            assert stream.device == self.device
            assert FakeMemory.holds(places.workspace, self.workspace_nbytes)
            ctypes.memset(places.workspace, 0xFF, self.workspace_nbytes)
            image = self._at(places.image, _last(what.image))
            output = self._at(places.output, _last(what.output))
            output[:] = self._computed(image, places)

        return launch

    def _computed(self, image: np.ndarray, places: cuda.Places) -> np.ndarray:
        what = self._what
        if isinstance(what, Pool):
            return pooled_windows(
                image, what.window, what.strides, what.pads,
                averages=what.averages, counts_padding=what.counts_padding,
            )  # fmt: skip
        assert places.filters is not None
        return convolved(
            image,
            np.moveaxis(self._at(places.filters, _last(what.filters)), -1, 1),
            None if places.bias is None else self._at(places.bias, what.output[1:2]),
            None if places.added is None else self._at(places.added, _last(what.output)),
            strides=what.strides,
            dilations=what.dilations,
            pads=what.pads,
            rectified=what.is_rectified,
        )

    def _at(self, pointer: int, shape: Sequence[int]) -> np.ndarray:
        """The tensor that lies at an address."""
        kind = TensorType(self._what.element_type, tuple(shape))
        memory = (ctypes.c_char * kind.nbytes).from_address(pointer)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element_type)
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape with its channels, which come second, last."""
    first, channels, *sizes = shape
    return (first, *sizes, channels)


class FakeGraph:
    """Holds what was issued; refuses as often as `refusals` says."""

    refusals = 0
    launches = 0
    open_count = 0

    def __init__(self, issue: Callable[[], None]) -> None:
        self._issue = issue
        FakeGraph.open_count += 1

    @classmethod
    def capture(cls, main: FakeStream, issue: Callable[[], None]) -> FakeGraph:
        FakeGraph.refuse()
        return cls(issue)

    @staticmethod
    def refuse() -> None:
        if FakeGraph.refusals:
            FakeGraph.refusals -= 1
            raise CaptureError("The capture was refused (planted).")

    @classmethod
    def assemble(
        cls,
        chains: Sequence[FakeChain],
        wired: Iterable[WiredNode],
        workspaces: Sequence[int],
    ) -> FakeGraph:
        """A run can't be cut, so all lanes run until nothing changes any more."""
        *lanes, uploads, fetches = chains
        round_count = sum(1 for lane in lanes for node in lane.nodes if node.is_work)
        assert len(list(wired)) == round_count + 2

        def issue() -> None:
            uploads.issue()
            for _ in range(round_count):
                for lane in lanes:
                    lane.issue()
            fetches.issue()

        return cls(issue)

    def launch(self, stream: FakeStream) -> None:
        assert stream.is_open
        FakeGraph.launches += 1
        self._issue()

    def close(self) -> None:
        FakeGraph.open_count -= 1


def install(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """Put the fakes in the place of CUDA, and sessions of the CPU in that of the GPU's."""

    def open_session(source: ModelPart | Path, settings: SessionSettings) -> OrtSession:
        on_cpu = replace(
            settings,
            device=Device("cpu"),
            stream_handle=None,
            graph_capture=False,
            keeps_nodes=False,
        )
        return OrtSession(source, on_cpu)

    monkeypatch.setattr(cuda, "Stream", FakeStream)
    monkeypatch.setattr(cuda, "graph_stream", lambda device: cuda.Stream(device))
    monkeypatch.setattr(cuda, "Buffer", FakeBuffer)
    monkeypatch.setattr(buffers, "LARGE_NBYTES", 60)  # some of the tests' tensors are large
    monkeypatch.setattr(buffers, "PART_NBYTES", 28)
    monkeypatch.setattr(cuda, "DeviceMemory", FakeMemory)
    monkeypatch.setattr(cuda, "Graph", FakeGraph)
    monkeypatch.setattr(cuda, "Chain", FakeChain)
    monkeypatch.setattr(runner, "plan_arena", lambda plan, nbytes, *_: packed(nbytes))
    monkeypatch.setattr(execution, "lower", lambda source, device, custom_ops: source)
    monkeypatch.setattr(cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda, "other_contexts", lambda devices: nullcontext())
    monkeypatch.setattr(cuda, "enable_peer_access", lambda devices: None)
    monkeypatch.setattr(tensors, "torch_device", lambda device: _cpu())
    monkeypatch.setattr(runner, "OrtSession", open_session)
    monkeypatch.setattr(cuda, "fused_kernel", FakeKernel)
    monkeypatch.setattr(cuda, "cutting", _cutting)
    monkeypatch.setattr(cuda, "reordering", _reordering)
    monkeypatch.setattr(runner, "called", lambda device, function, *values: function(*values))
    monkeypatch.setattr(FakeKernel, "wanted", [])
    monkeypatch.setattr(cuda, "keep_blas_workspace", lambda kind: None)
    monkeypatch.setattr(FakeGraph, "refusals", 0)
    monkeypatch.setattr(FakeGraph, "launches", 0)
    monkeypatch.setattr(FakeGraph, "open_count", 0)
    return FakeGraph


def take_tensors_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's tensors on the host pass for such on a GPU."""
    monkeypatch.setattr(load, "_is_on_gpu", lambda value: hasattr(value, "detach"))


def _cutting(move: Cut, source: int, target: int, device: Device) -> Callable[[FakeStream], None]:
    def launch(stream: FakeStream) -> None:
        assert stream.is_open
        assert stream.device == device
        ctypes.memmove(target, source + move.start_nbytes, move.nbytes)

    return launch


def _reordering(
    move: Reordered, source: int, target: int, device: Device
) -> Callable[[FakeStream], None]:
    def launch(stream: FakeStream) -> None:
        assert stream.is_open
        assert stream.device == device
        steps = [step * move.item_nbytes for step in move.strides]
        last = sum((size - 1) * step for size, step in zip(move.shape, steps, strict=True))
        start = source + move.start * move.item_nbytes
        memory = (ctypes.c_char * (last + move.item_nbytes)).from_address(start)
        numbers = np.frombuffer(memoryview(memory), f"u{move.item_nbytes}")
        ordered = np.lib.stride_tricks.as_strided(numbers, move.shape, steps).copy()
        ctypes.memmove(target, ordered.ctypes.data, ordered.nbytes)

    return launch


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
