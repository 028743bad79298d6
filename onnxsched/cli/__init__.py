"""The command line: parse, call, print, exit code. The only package that knows the terminal.

stdout is the result, stderr the progress. Exit codes are those of `onnxsched_runtime.errors`.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import typer

from onnxsched.cli import commands, files  # noqa: F401 - each adds its commands
from onnxsched.cli.app import app
from onnxsched_runtime.errors import OnnxschedError

_UsageMistake: Any = typer.BadParameter.__mro__[2]
"""click's base exception, which typer may bring under its own name."""


def main() -> None:
    """Run a command; whatever goes wrong ends in one sentence and an exit code.

    The process ends at once: everything is written and closed by then, and taking torch and
    CUDA apart module by module only costs time.
    """
    gc.set_threshold(100_000, 50, 50)  # collecting while torch is imported costs 0.2 s
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
    except OSError as error:
        code = _fail(f"The result can't be written to stdout ({error.strerror}).", 1)
    sys.stderr.flush()
    os._exit(code)


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
        text = " ".join(str(error).split())[:300] or "no message"
        return _fail(f"Unforeseen {type(error).__name__}: {text}; please report it.", 1)
    if code == 130:
        return _fail("Interrupted; nothing was written.", 130)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if message:
        print(f"onnxsched: {message}", file=sys.stderr)
    return code
