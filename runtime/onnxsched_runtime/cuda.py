"""CUDA: streams, events, graphs, buffers. The only module that touches it.

Streams, events and graphs go through the CUDA bindings that torch brings; torch itself owns the
buffers, so that tensors go in and out without a copy. Both are imported at first use.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx

from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError, DeviceError, OnnxschedError
from onnxsched_runtime.tensor import TensorType

_DELAY_CYCLES = 100_000
"""About 50 us at 1.98 GHz: longer than the launch of a graph takes."""


@functools.cache
def _torch() -> Any:
    import torch

    return torch


@functools.cache
def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DeviceError(
            "The CUDA bindings are not installed; install a torch built for CUDA, which brings "
            "cuda-bindings."
        ) from error
    return runtime


def _check(result: tuple[Any, ...]) -> Any:
    """Unpack what a CUDA call returns."""
    error, *values = result
    if error != _runtime().cudaError_t.cudaSuccess:
        _, text = _runtime().cudaGetErrorString(error)
        raise OnnxschedError(f"CUDA reports error {int(error)}: {text.decode()}.")
    return values[0] if len(values) == 1 else tuple(values)


def device_count() -> int:
    """How many CUDA devices torch sees; 0 with a torch built without CUDA."""
    torch = _torch()
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def require_device(device: Device) -> None:
    """Check that a device is there.

    Raises:
        DeviceError: It is not.
    """
    count = device_count()
    if device.kind == "cuda" and device.index >= count:
        there = f"{count} CUDA devices" if count else "no CUDA device"
        raise DeviceError(
            f"Device {device} is not available: this machine has {there}; "
            "`onnxsched doctor` says more."
        )


class Stream:
    """A CUDA stream of its own (torch's pool would alias them after 32)."""

    def __init__(self, device: Device) -> None:
        require_device(device)
        self.device = device
        with _torch().cuda.device(device.index):
            self._stream = _check(
                _runtime().cudaStreamCreateWithFlags(_runtime().cudaStreamNonBlocking)
            )

    @property
    def handle(self) -> int:
        """The address that ORT takes as `user_compute_stream`."""
        return int(self._stream)

    def record(self) -> Event:
        """Record a new event after all that was issued."""
        event = Event()
        event.record(self)
        return event

    def wait(self, event: Event) -> None:
        """Let what is issued from now on wait for the event."""
        _check(_runtime().cudaStreamWaitEvent(self._stream, event.native, 0))

    def wait_for_caller(self) -> None:
        """Wait for what the caller has issued on torch's current stream."""
        event = _torch().cuda.current_stream(self.device.index).record_event()
        _check(_runtime().cudaStreamWaitEvent(self._stream, event.cuda_event, 0))

    def release_to_caller(self) -> None:
        """Make torch's current stream wait for this one."""
        event = self.record()
        current = _torch().cuda.current_stream(self.device.index).cuda_stream
        _check(_runtime().cudaStreamWaitEvent(current, event.native, 0))

    def synchronize(self) -> None:
        """Wait on the host until all that was issued is done."""
        _check(_runtime().cudaStreamSynchronize(self._stream))

    def delay(self, cycles: int) -> None:
        """Keep the stream busy for some clock cycles, so that what follows queues up behind."""
        torch = _torch()
        with torch.cuda.stream(torch.cuda.ExternalStream(self.handle, self.device.index)):
            torch.cuda._sleep(cycles)

    def close(self) -> None:
        """Destroy the stream; what it still runs is finished first."""
        if self._stream is not None:
            _check(_runtime().cudaStreamDestroy(self._stream))
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Event:
    """A CUDA event, destroyed with its last reference."""

    def __init__(self, timing: bool = False) -> None:
        runtime = _runtime()
        flags = runtime.cudaEventDefault if timing else runtime.cudaEventDisableTiming
        self.native = _check(runtime.cudaEventCreateWithFlags(flags))

    def record(self, stream: Stream) -> None:
        """Record on a stream."""
        _check(_runtime().cudaEventRecord(self.native, stream.handle))

    def elapsed_us(self, earlier: Event) -> float:
        """Time between two recorded events, after waiting for this one."""
        _check(_runtime().cudaEventSynchronize(self.native))
        return float(_check(_runtime().cudaEventElapsedTime(earlier.native, self.native))) * 1e3

    def __del__(self) -> None:
        if (native := getattr(self, "native", None)) is not None:
            _runtime().cudaEventDestroy(native)


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, native: Any) -> None:
        runtime = _runtime()
        flag = runtime.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagAutoFreeOnLaunch
        self.node_kinds = _node_kinds(native)
        self._exec = _check(runtime.cudaGraphInstantiate(native, flag))
        _check(runtime.cudaGraphDestroy(native))

    @classmethod
    def capture(cls, main: Stream, issue: Callable[[], None]) -> Self:
        """Capture what `issue` launches on `main` and on streams forked from it.

        Raises:
            CaptureError: Something that was issued can't be captured, or it left host nodes,
                which would run callbacks meant to run once at every replay.
        """
        runtime = _runtime()
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _check(runtime.cudaStreamBeginCapture(main.handle, mode))
        try:
            issue()
        except Exception as error:
            abandoned = runtime.cudaStreamEndCapture(main.handle)[1]
            if abandoned is not None and int(abandoned):
                runtime.cudaGraphDestroy(abandoned)
            raise CaptureError(f"The capture was refused ({error}).") from error
        try:
            graph = cls(_check(runtime.cudaStreamEndCapture(main.handle)))
        except OnnxschedError as error:
            raise CaptureError(f"The capture was refused ({error})") from error
        if hosts := graph.node_kinds["Host"]:
            graph.close()
            raise CaptureError(f"The captured graph holds {hosts} host nodes, unsafe to replay.")
        return graph

    def launch(self, stream: Stream) -> None:
        """Replay on a stream."""
        _check(_runtime().cudaGraphLaunch(self._exec, stream.handle))

    def close(self) -> None:
        """Destroy the graph."""
        if self._exec is not None:
            _check(_runtime().cudaGraphExecDestroy(self._exec))
            self._exec = None


def _node_kinds(graph: Any) -> Counter[str]:
    """How many nodes of each kind a graph holds."""
    runtime = _runtime()
    _, count = _check(runtime.cudaGraphGetNodes(graph, 0))
    nodes, _ = _check(runtime.cudaGraphGetNodes(graph, count))
    kinds = (_check(runtime.cudaGraphNodeGetType(node)) for node in nodes[:count])
    return Counter(kind.name.removeprefix("cudaGraphNodeType") for kind in kinds)


class Buffer:
    """Device memory of a fixed address and type, with pinned memory to fill and read it."""

    def __init__(self, kind: TensorType, device: Device) -> None:
        torch = _torch()
        self.kind, self.device = kind, device
        dtype = torch_dtype(kind.element_type)
        self.tensor = torch.zeros(kind.shape, dtype=dtype, device=str(device))
        self._pinned: Any = None

    @property
    def pointer(self) -> int:
        """Device address."""
        return int(self.tensor.data_ptr())

    def fill(self, array: np.ndarray, stream: Stream) -> None:
        """Copy host values in, on a stream, through pinned memory."""
        if self.kind.nbytes:
            np.copyto(self.staging, array.reshape(self.staging.shape).view(self.staging.dtype))
            self._copy(self.pointer, self._pinned.data_ptr(), stream)

    def fill_from_tensor(self, tensor: Any, stream: Stream) -> None:
        """Copy a device tensor in, on a stream."""
        if self.kind.nbytes and tensor.data_ptr() != self.pointer:
            self._copy(self.pointer, tensor.data_ptr(), stream)

    def fetch(self, stream: Stream) -> None:
        """Start the copy to pinned memory; `staging` holds it once the stream is done."""
        if self.kind.nbytes:
            _ = self.staging
            self._copy(self._pinned.data_ptr(), self.pointer, stream)

    def copy_to_new_tensor(self, stream: Stream) -> Any:
        """A new torch tensor that `stream` copies the contents into."""
        copy = _torch().empty_like(self.tensor)
        if self.kind.nbytes:
            self._copy(copy.data_ptr(), self.pointer, stream)
        return copy

    @functools.cached_property
    def staging(self) -> np.ndarray:
        """Pinned memory as an array of the buffer's shape."""
        self._pinned = _torch().empty(self.kind.nbytes, dtype=_torch().uint8, pin_memory=True)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind.element_type)
        return np.asarray(self._pinned.numpy()).view(dtype).reshape(self.kind.shape)

    def _copy(self, target: int, source: int, stream: Stream) -> None:
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDefault
        nbytes = self.kind.nbytes
        _check(_runtime().cudaMemcpyAsync(target, source, nbytes, kind, stream.handle))


@functools.cache
def torch_dtype(element_type: int) -> Any:
    """The torch type of an ONNX element type."""
    torch = _torch()
    special = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn,
               "float8_e5m2": torch.float8_e5m2}  # fmt: skip
    name = onnx.helper.tensor_dtype_to_np_dtype(element_type).name
    return special.get(name) or getattr(torch, name)


def tensor_on_device(value: Any, device: Device) -> Any:
    """A torch tensor over the memory of any DLPack object, moved to the device if elsewhere."""
    torch = _torch()
    tensor = value if isinstance(value, torch.Tensor) else torch.from_dlpack(value)
    return tensor.to(str(device)).contiguous()


def time_launches_us(
    stream: Stream, launch: Callable[[], None], count: int, warm_up_count: int = 2
) -> tuple[float, ...]:
    """Device time of `launch`, between events on its stream, one sample a launch.

    The stream is kept busy for some 50 us before the first event, the same for whatever is
    measured, so that launching one graph is not part of the time; launching many kernels is.
    """
    start, end = Event(timing=True), Event(timing=True)
    samples = []
    for number in range(warm_up_count + count):
        synchronize()
        stream.delay(_DELAY_CYCLES)
        start.record(stream)
        launch()
        end.record(stream)
        elapsed_us = end.elapsed_us(start)
        if number >= warm_up_count:
            samples.append(elapsed_us)
    return tuple(samples)


def synchronize() -> None:
    """Wait for everything on every device."""
    _torch().cuda.synchronize()


def used_memory_nbytes(device: Device) -> int:
    """Device memory in use, by anyone."""
    free, total = _torch().cuda.mem_get_info(device.index)
    return int(total - free)


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name what is launched inside, for `kernel_trace`."""
    with _torch().profiler.record_function(name):
        yield


def kernel_trace(work: Callable[[], None]) -> dict[str, Any]:
    """Run `work` under torch's profiler (CUPTI) and return its Chrome trace."""
    torch = _torch()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(path))
        return dict(json.loads(path.read_bytes()))


def device_properties(device: Device) -> dict[str, Any]:
    """What a GPU is and what one of its multiprocessors holds."""
    torch = _torch()
    found = torch.cuda.get_device_properties(device.index)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_nbytes": found.total_memory,
        "multiprocessor_count": found.multi_processor_count,
        "shared_memory_nbytes": found.shared_memory_per_multiprocessor,
        "registers": found.regs_per_multiprocessor,
        "threads": found.max_threads_per_multi_processor,
        "l2_nbytes": found.L2_cache_size,
    }


def library_versions() -> dict[str, str]:
    """Versions of torch, CUDA, cuDNN and the driver; no driver without a device."""
    torch = _torch()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if device_count():
        driver = _check(_runtime().cudaDriverGetVersion())
        versions["cuda_driver"] = f"{driver // 1000}.{driver % 1000 // 10}"
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def has_peer_access(source: Device, target: Device) -> bool:
    """Whether `source` can reach the memory of `target` directly."""
    return bool(_torch().cuda.can_device_access_peer(source.index, target.index))
