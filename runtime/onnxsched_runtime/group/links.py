"""Tensors between ranks: host values over gloo, device memory over NCCL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np

from onnxsched_runtime.cuda import Buffer, Stream
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.group.binding import torch_module
from onnxsched_runtime.group.monitor import Monitor
from onnxsched_runtime.group.peers import FOREVER, Peers
from onnxsched_runtime.group.values import empty, packed, raw, unpacked
from onnxsched_runtime.plan import Receive, Send
from onnxsched_runtime.tensor import TensorType


class GlooLinks:
    """Sends and receives, from any thread: each tensor has a tag of its own."""

    def __init__(
        self,
        peers: Peers,
        monitor: Monitor,
        kinds: Mapping[str, TensorType],
        tensors: Iterable[str],
    ) -> None:
        """Connect to all ranks.

        Args:
            peers: Who takes part.
            monitor: Told who is waited for.
            kinds: The types of tensors; those that are not static travel with their shape.
            tensors: All that travels between any two ranks.
        """
        self._monitor = monitor
        self._kinds = kinds
        self._tags = {tensor: tag for tag, tensor in enumerate(sorted(set(tensors)))}
        self._rank, self._count = peers.rank, peers.count
        self._group: Any = peers.gloo_group()
        monitor.cancels = self.cancel

    def computing(self) -> AbstractContextManager[None]:
        """A step between sending and receiving; see `Monitor`."""
        return self._monitor.computing()

    def send(self, step: Send, value: Any) -> None:
        """Send a value and wait until it is on its way.

        Raises:
            RankError: All ranks must end, perhaps since the value can't travel.
        """
        with self.computing():
            kind = self._kinds.get(step.tensor)
            if kind is not None and kind.is_static:
                if value.shape != kind.shape:
                    raise ModelError(
                        f"'{step.tensor}' has shape {list(value.shape)}, but the model says "
                        f"{list(kind.shape or ())}."
                    )
                parts = [raw(value)]
            else:
                content = packed(step.tensor, value)
                parts = [raw(np.array([content.size])), content]
        with self._monitor.waiting_for(step.rank):
            for part in parts:
                self._wait(step, part, "send")

    def receive(self, step: Receive) -> Any:
        """Wait for a value.

        Raises:
            RankError: All ranks must end.
        """
        kind = self._kinds.get(step.tensor)
        with self._monitor.waiting_for(step.rank):
            if kind is not None and kind.is_static:
                value = empty(kind)
                self._wait(step, raw(value), "recv")
                return value
            size = np.empty(1, np.int64)
            self._wait(step, raw(size), "recv")
            content = np.empty(size[0], np.uint8)
            self._wait(step, content, "recv")
            return unpacked(content)

    def _wait(self, step: Send | Receive, content: np.ndarray, call: str) -> None:
        if not content.size:
            return
        tensor = torch_module().from_numpy(content if content.flags.writeable else content.copy())
        tag = self._tags[step.tensor]
        getattr(self._group, call)([tensor], step.rank, tag).wait(FOREVER)

    def cancel(self) -> None:
        """End whatever waits, here and at the other ends.

        gloo gives up all connections of a group when one receive on it takes too long, so one
        that nobody sends for is given no time.
        """
        peer = (self._rank + 1) % self._count
        with contextlib.suppress(RuntimeError):
            unsent = self._group.recv([torch_module().empty(1)], peer, len(self._tags))
            unsent.wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Give up the connections; no one may need them any more."""
        self._group = None


class NcclLinks:
    """Issues sends and receives on streams of a GPU."""

    def __init__(self, peers: Peers, monitor: Monitor) -> None:
        """Make a group, whose members connect when they first send."""
        self._monitor = monitor
        self._group: Any = peers.nccl_group()
        self._views: dict[Buffer, Any] = {}
        monitor.cancels = self.cancel

    def wait_until_ready(self) -> None:
        """Wait until all ranks have opened their sessions; see `Monitor`."""
        self._monitor.wait_until_ready()

    def issue(self, step: Send | Receive, buffer: Buffer, stream: Stream) -> None:
        """Start to send or receive, in the order of the stream."""
        if not buffer.kind.nbytes:
            return
        if buffer not in self._views:  # lives as long as what is captured
            self._views[buffer] = buffer.as_bytes()
        call = self._group.send if isinstance(step, Send) else self._group.recv
        with stream.as_current():
            call([self._views[buffer]], step.rank, 0).wait()

    def cancel(self) -> None:
        """End whatever runs on the GPU."""
        self._group.abort()

    def close(self) -> None:
        """Give up the connections; no one may need them any more."""
        self._views = {}
        self._group = None
