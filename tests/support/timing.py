"""Limits of CPU time that hold on slow and busy machines, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP_S = 0.08
"""What `_loop_s` takes where the limits were set."""


@contextmanager
def at_most_cpu_s(limit_s: float, what: str = "") -> Iterator[None]:
    """Fail where the block takes more CPU time; as much more as a loop takes is allowed."""
    before_s, started = _loop_s(), time.process_time()
    yield
    taken_s = time.process_time() - started
    slowness = max(1.0, before_s / _LOOP_S, _loop_s() / _LOOP_S)
    assert taken_s < limit_s * slowness, f"{what} took {taken_s:.1f} s"


def _loop_s() -> float:
    """CPU time of work like that of policies."""
    started, counts = time.process_time(), dict.fromkeys(range(1000), 0)
    for number in range(300_000):
        counts[number % 1000] = max(counts[number % 777], number)
    return time.process_time() - started
