"""How a process of several ends: with one sentence and one exit code, whatever comes together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from onnxsched_runtime.executors.ranks import RankExecutor

_GRACE_S = 2.0
"""For a process to end by itself when all must; then it is ended."""
INTERRUPTED = 130, "Interrupted."
"""The exit code after Ctrl-C, and what is said then."""
_last_word = threading.Lock()
"""Whoever takes it ends this process; nobody gives it back."""


def end(code: int, sentence: str) -> NoReturn:
    """End this process at once, unless another thread is about to.

    At once, since a thread that is stuck, or a launcher's SIGTERM, might have its way otherwise.

    Args:
        code: The exit code.
        sentence: What to say, if anything.
    """
    _last_word.acquire()
    with contextlib.suppress(OSError):  # the exit code says it, too
        if sentence:  # in one piece, or that of another process may come between, as under -u
            print(f"onnxsched: {sentence}\n", end="", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def end_when_interrupted() -> None:
    """End this process at once at a Ctrl-C, while no others have to be told.

    A KeyboardInterrupt would get lost in C extensions that are being imported, or abort them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _interrupted)


def raise_when_interrupted() -> None:
    """Let a Ctrl-C be a KeyboardInterrupt again, so that others are told."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_interrupts() -> None:
    """Let no further Ctrl-C come between what is said and the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupted(*_: object) -> None:
    ignore_interrupts()
    end(*INTERRUPTED)


def end_when_asked(held: Sequence[RankExecutor]) -> None:
    """End this process soon after a SIGTERM, with the reason if there is one by then.

    A launcher that sees one process end asks the others to at once, mostly before they have found
    out why. Who has found out ends as if not asked.

    Args:
        held: What it runs, once that is loaded.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def follow() -> None:
        while os.read(reading, 1) != bytes([signal.SIGTERM]):
            pass  # another signal
        time.sleep(_GRACE_S)
        if verdicts := [executor.verdict for executor in held if executor.verdict]:
            end(1, verdicts[0])
        rank = os.environ.get("RANK", "0")
        when = "" if held else " while it loaded the model; another may have ended"
        end(128 + signal.SIGTERM, f"Rank {rank} was asked to end (SIGTERM){when}.")

    threading.Thread(target=follow, daemon=True).start()
    # handlers run in the main thread, which may wait in C for a rank that is gone
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)


def end_with_the_others(executor: RankExecutor) -> None:
    """End this process when all must, even in the middle of what can't be interrupted."""

    def watch() -> None:
        executor.failed.wait()
        time.sleep(_GRACE_S)
        end(1, executor.verdict or "All processes must end.")

    threading.Thread(target=watch, daemon=True).start()
