"""The command line: parse, call, print, exit code. The only package that knows the terminal.

stdout is the result, stderr the progress. Exit codes are those of `onnxsched_runtime.errors`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from types import TracebackType
from typing import Any

import typer

from onnxsched.cli import commands, files  # noqa: F401 - each adds its commands
from onnxsched.cli.app import app
from onnxsched_runtime.errors import OnnxschedError, unforeseen

_UsageMistake: Any = typer.BadParameter.__mro__[2]
"""click's base exception, which typer may bring under its own name."""


def main() -> None:
    """Run a command; whatever goes wrong ends in one sentence and an exit code.

    The process ends at once: everything is written and closed by then, and taking torch and
    CUDA apart module by module only costs time.
    """
    gc.set_threshold(100_000, 50, 50)  # collecting while torch is imported costs 0.2 s
    _prepare_streams()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unwritten(error)  # one sentence, the first
    with contextlib.suppress(OSError):  # a full disk leaves the exit code to tell
        sys.stderr.flush()
    os._exit(code)


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
        code = app(arguments or ["--help"], prog_name="onnxsched", standalone_mode=False)
    except OnnxschedError as error:
        return _fail(str(error), error.exit_code)
    except _UsageMistake as error:
        message = error.format_message().rstrip(".")
        return _fail(f"{message}; `onnxsched --help` says more.", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted; nothing was written.", 130)
    except MemoryError:
        return _fail("Memory ran out; try a smaller model or fewer --streams.", 1)
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _unforeseen(error)
    if code == 130:
        return _fail("Interrupted; nothing was written.", 130)
    return code if isinstance(code, int) else 0


def _unforeseen(error: Exception) -> int:
    if _is_interruption(error):
        return _fail("Interrupted; nothing was written.", 130)
    if isinstance(error, OSError) and _is_of_printing(error.__traceback__):
        return _unwritten(error)
    return _fail(unforeseen(error), 1)


def _is_interruption(error: BaseException) -> bool:
    """Whether Ctrl-C is what an error comes from: C extensions wrap it while they are imported."""
    reasons: list[BaseException] = [error]
    for reason in reasons:
        further = (reason.__cause__, reason.__context__)
        reasons += [e for e in further if e is not None and e not in reasons]
    return any(isinstance(reason, KeyboardInterrupt) for reason in reasons)


def _is_of_printing(traceback: TracebackType | None) -> bool:
    """Whether it was stdout that failed: unbuffered, it does so where something is printed."""
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.startswith(("onnxsched.cli", "typer.", "click."))


def _unwritten(error: OSError) -> int:
    """The exit code where stdout takes no more; a reader that has left is told nothing."""
    if isinstance(error, BrokenPipeError):
        return 1
    return _fail(f"The result can't be written to stdout ({error.strerror}).", 1)


def _fail(message: str, code: int) -> int:
    if message:
        with contextlib.suppress(OSError):  # the exit code says it, too
            print(f"onnxsched: {message}", file=sys.stderr)
    return code
