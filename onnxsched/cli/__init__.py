"""The command line: parse, call, print, exit code. The only package that knows the terminal.

stdout is the result, stderr the progress. Exit codes are those of `onnxsched_runtime.errors`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys


def main() -> None:
    """Run a command; whatever goes wrong ends in one sentence and an exit code.

    The process ends at once: everything is written and closed by then, and taking torch and
    CUDA apart module by module only costs time.
    """
    gc.set_threshold(100_000, 50, 50)  # collecting while torch is imported costs 0.2 s
    _prepare_streams()
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


def _prepare_streams() -> None:
    """Let both streams take whatever is printed, if the caller closed them or they speak ASCII."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open to the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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
    if isinstance(error, BrokenPipeError):
        return 1
    return fail(f"The result can't be written to stdout ({error.strerror}).", 1)


def fail(message: str, code: int) -> int:
    """Say what went wrong, and return the exit code."""
    if message:
        with contextlib.suppress(OSError):  # the exit code says it, too
            print(f"onnxsched: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
