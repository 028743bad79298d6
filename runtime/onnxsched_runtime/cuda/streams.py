"""CUDA streams, events, and device time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Self

from onnxsched_runtime.cuda.binding import (
    check,
    cudart,
    current_device,
    torch_module,
)
from onnxsched_runtime.cuda.devices import require_device, synchronize
from onnxsched_runtime.cuda.turns import forget_idle_streams
from onnxsched_runtime.device import Device

_DELAY_CYCLES = 200_000
"""About 100 us at 1.98 GHz: longer than the launch of a graph takes."""


_unused: dict[Device, list[Any]] = {}
"""Streams that were closed, to be used again: a process should never have used many."""


class Stream:
    """A CUDA stream that no one else has (torch's pool would alias them after 32)."""

    def __init__(self, device: Device) -> None:
        require_device(device)
        self.device = device
        self._events: dict[Device, Event] = {}
        try:  # another thread may take the last
            self._stream = _unused.setdefault(device, []).pop()
        except IndexError:
            with current_device(device):
                self._stream = check(
                    cudart().cudaStreamCreateWithFlags(cudart().cudaStreamNonBlocking)
                )
        self.handle = int(self._stream)
        """The address that ORT takes as `user_compute_stream`."""

    def record(self) -> Event:
        """Record a new event after all that was issued."""
        event = Event(self.device)
        event.record(self)
        return event

    def wait(self, event: Event) -> None:
        """Let what is issued from now on wait for the event."""
        check(cudart().cudaStreamWaitEvent(self._stream, event.native, 0))

    def wait_for_caller(self, device: Device) -> None:
        """Wait for what the caller has issued on torch's current stream of a device."""
        current = torch_module().cuda.current_stream(device.index).cuda_stream
        event = self._kept_event(device)
        with current_device(device):  # whose default stream is meant by 0
            check(cudart().cudaEventRecord(event.native, current))
        check(cudart().cudaStreamWaitEvent(self._stream, event.native, 0))

    def release_to_caller(self, device: Device) -> None:
        """Make torch's current stream of a device wait for this one."""
        current = torch_module().cuda.current_stream(device.index).cuda_stream
        event = self._kept_event(self.device)
        event.record(self)
        with current_device(device):
            check(cudart().cudaStreamWaitEvent(current, event.native, 0))

    def _kept_event(self, device: Device) -> Event:
        """An event that is recorded again and again: a wait is for what it was recorded last."""
        if device not in self._events:
            self._events[device] = Event(device)
        return self._events[device]

    def synchronize(self) -> None:
        """Wait on the host until all that was issued is done."""
        check(cudart().cudaStreamSynchronize(self._stream))

    def as_current(self) -> AbstractContextManager[None]:
        """Let torch launch on it for a while."""
        torch = torch_module()
        own = torch.cuda.ExternalStream(self.handle, self.device.index)
        context: AbstractContextManager[None] = torch.cuda.stream(own)
        return context

    def delay(self, cycles: int) -> None:
        """Keep the stream busy for some clock cycles, so that what follows queues up behind."""
        with self.as_current():
            torch_module().cuda._sleep(cycles)

    def close(self) -> None:
        """Leave the stream to others; what it still runs is finished first."""
        if self._stream is not None:
            _unused.setdefault(self.device, []).append(self._stream)
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_shared: ContextVar[dict[Device, Stream] | None] = ContextVar("_shared", default=None)


@contextmanager
def one_graph_stream() -> Iterator[None]:
    """Let all that opens streams to launch on meanwhile share one a device, since it takes turns.

    A process that has used many streams starts every kernel later; see
    `docs/adr/0013-few-streams.md`. Inside another, this is the other.
    """
    if _shared.get() is not None:
        yield
        return
    streams: dict[Device, Stream] = {}
    token = _shared.set(streams)
    try:
        yield
    finally:
        _shared.reset(token)
        for stream in streams.values():
            stream.close()


def graph_stream(device: Device) -> AbstractContextManager[Stream]:
    """A stream to launch on: one's own, or that of `one_graph_stream`."""
    shared = _shared.get()
    if shared is None:
        return Stream(device)
    if device not in shared:
        shared[device] = Stream(device)
    return nullcontext(shared[device])


class Event:
    """A CUDA event, destroyed with its last reference."""

    def __init__(self, device: Device, timing: bool = False) -> None:
        runtime = cudart()
        flags = runtime.cudaEventDefault if timing else runtime.cudaEventDisableTiming
        with current_device(device):
            self.native = check(runtime.cudaEventCreateWithFlags(flags))

    def record(self, stream: Stream) -> None:
        """Record on a stream."""
        check(cudart().cudaEventRecord(self.native, stream.handle))

    def synchronize(self) -> None:
        """Wait on the host until what it was recorded after is done."""
        check(cudart().cudaEventSynchronize(self.native))

    def elapsed_us(self, earlier: Event) -> float:
        """Time between two recorded events, after waiting for this one."""
        self.synchronize()
        return float(check(cudart().cudaEventElapsedTime(earlier.native, self.native))) * 1e3

    def __del__(self) -> None:
        if (native := getattr(self, "native", None)) is not None:
            cudart().cudaEventDestroy(native)


def time_launches_us(
    stream: Stream, launch: Callable[[], None], count: int, warm_up_count: int = 2
) -> tuple[float, ...]:
    """Device time of `launch`, between events on its stream, one sample a launch.

    The stream is kept busy for some 100 us before the first event, the same for whatever is
    measured, so that launching one graph is not part of the time; launching many kernels is.
    Idle streams are forgotten before, within `other_contexts`.
    """
    forget_idle_streams()
    start, end = Event(stream.device, timing=True), Event(stream.device, timing=True)
    samples = []
    for number in range(warm_up_count + count):
        synchronize(stream.device)
        stream.delay(_DELAY_CYCLES)
        start.record(stream)
        launch()
        end.record(stream)
        elapsed_us = end.elapsed_us(start)
        if number >= warm_up_count:
            samples.append(elapsed_us)
    return tuple(samples)
