"""From a command line to an exit code: runs a command, and puts what goes wrong in a sentence."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import typer

from onnxsched.cli import commands, fail, files, interrupted, unwritten  # noqa: F401 - for effect
from onnxsched.cli.app import app
from onnxsched_runtime.errors import OnnxschedError, unforeseen

_UsageMistake: Any = typer.BadParameter.__mro__[2]
"""click's base exception, which typer may bring under its own name."""


def dispatch(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        code = app(arguments or ["--help"], prog_name="onnxsched", standalone_mode=False)
    except OnnxschedError as error:
        return fail(str(error), error.exit_code)
    except _UsageMistake as error:
        message = error.format_message().rstrip(".")
        return fail(f"{message}; `onnxsched --help` says more.", 2)
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except MemoryError:
        return fail("Memory ran out; try a smaller model or fewer --streams.", 1)
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _unforeseen(error)
    if code == 130:
        return interrupted()
    return code if isinstance(code, int) else 0


def _unforeseen(error: Exception) -> int:
    for reason in _reasons(error):  # C extensions wrap them while they are imported
        if isinstance(reason, KeyboardInterrupt):
            return interrupted()
        if isinstance(reason, SystemExit):  # a signal's
            return reason.code if isinstance(reason.code, int) else 1
    if isinstance(error, OSError) and _is_of_printing(error.__traceback__):
        return unwritten(error)
    return fail(unforeseen(error), 1)


def _reasons(error: BaseException) -> list[BaseException]:
    """An error and all that it comes from."""
    reasons: list[BaseException] = [error]
    for reason in reasons:
        further = (reason.__cause__, reason.__context__)
        reasons += [e for e in further if e is not None and e not in reasons]
    return reasons


def _is_of_printing(traceback: TracebackType | None) -> bool:
    """Whether it was stdout that failed: unbuffered, it does so where something is printed."""
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.startswith(("onnxsched.cli", "typer.", "click."))
