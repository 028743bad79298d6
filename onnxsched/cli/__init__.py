"""The command line: parse, call, print, exit code. The only package that knows the terminal.

stdout is the result, stderr the progress. Exit codes are those of `onnxsched_runtime.errors`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys

from onnxsched_runtime import printing


def main() -> None:
    """Run a command; whatever goes wrong ends in one sentence and an exit code.

    The process ends at once: everything is written and closed by then, and taking torch and
    CUDA apart module by module only costs time.
    """
    gc.set_threshold(100_000, 50, 50)  # collecting while torch is imported costs 0.2 s
    printing.prepare_streams()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _end)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or unwritten(error)  # one sentence, the first
    with contextlib.suppress(OSError):  # a full disk leaves the exit code to tell
        sys.stderr.flush()
    os._exit(code)


def _end(number: int, frame: object) -> None:
    """End as if by Ctrl-C, so that scratch folders and drafts go."""
    raise SystemExit(128 + number)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        from onnxsched.cli.dispatch import dispatch  # Ctrl-C may come while typer is imported

        return dispatch(arguments)
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """Say that Ctrl-C ended the command, and return its exit code."""
    return fail("Interrupted; nothing was written.", 130)


def unwritten(error: OSError) -> int:
    """The exit code where stdout takes no more; a reader that has left is told nothing."""
    return fail(printing.unwritten(error), 1)


def fail(message: str, code: int) -> int:
    """Say what went wrong, and return the exit code, which says it, too."""
    if message:
        say(message)
    return code


def say(message: str) -> None:
    """Put a sentence on stderr, on one line."""
    with contextlib.suppress(OSError):
        print(f"onnxsched: {' '.join(message.splitlines())}", file=sys.stderr)
