"""A store that does not answer costs one timeout, and no more."""

from __future__ import annotations

import threading
import time

import pytest

from onnxsched_runtime.errors import RankError
from onnxsched_runtime.group.store import Store


class Native:
    """A store of torch.distributed, as far as it is asked."""

    def __init__(self) -> None:
        self.is_up = threading.Event()

    def get(self, name: str) -> str:
        if name == "refused":
            raise RuntimeError("Connection reset by peer")
        if name == "late":
            self.is_up.wait()
        return f"{name} of {threading.current_thread().name}"


def test_answers_come_from_a_thread_that_ends_with_it() -> None:
    store = Store(Native(), 5.0)
    assert store.ask("get", "x") == "x of onnxsched-store"
    (thread,) = (t for t in threading.enumerate() if t.name == "onnxsched-store")
    store.close()
    thread.join(5.0)
    assert not thread.is_alive()
    with pytest.raises(RankError):
        store.ask("get", "x")


def test_a_refusal_is_no_silence() -> None:
    store = Store(Native(), 5.0)
    with pytest.raises(RankError, match="the store does not answer"):
        store.ask("get", "refused")
    assert store.ask("get", "x")
    store.close()


def test_silence_is_waited_for_once() -> None:
    native = Native()
    store = Store(native, 0.2)
    start_s = time.monotonic()
    for _ in range(5):
        with pytest.raises(RankError, match="the store does not answer"):
            store.ask("get", "late")
    assert 0.2 <= time.monotonic() - start_s < 1.0
    native.is_up.set()
    store.close()
