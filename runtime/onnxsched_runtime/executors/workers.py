"""Threads that are handed work, each with a queue of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Self

Work = Callable[[], None]
"""Raises nothing."""
_Queue = SimpleQueue[Work | None]


class Worker:
    """A thread that does what it is handed, one after the other.

    Those of `concurrent.futures` take no work once the main thread has returned, while others
    still serve; and Ctrl-C can leave a lock held that they share with the caller. Here the caller
    touches nothing but a queue, which is written in C.
    """

    def __init__(self) -> None:
        """Start it."""
        self._queue: _Queue = SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._queue,), daemon=True, name="onnxsched-lane"
        )
        try:
            self._thread.start()
        except BaseException:  # interrupted, while it may run already
            self._queue.put(None)
            raise

    def hand(self, work: Work) -> None:
        """Let it do this next."""
        self._queue.put(work)

    def close(self) -> None:
        """Wait until it has done all, and end it."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:  # where garbage is collected, say
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(queue: _Queue) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # it holds sessions, which are closed when nobody else does
