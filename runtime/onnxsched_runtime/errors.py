"""Every error a user can cause, as one tree.

    OnnxschedError            exit code 1   anything that failed while working
    ├── UsageError                     2   an option, an input file or a shape
    ├── NumericsError                  3   two models that should agree do not
    ├── DeviceError                    4   a device that is not there or does not load
    ├── ModelError                     5   a model that can't be read or is not supported
    │   └── AnnotationError            5   no schedule, or another model's schedule
    ├── SlowerError                    6   a benchmark below its required ratio
    ├── ScheduleError                  1   a policy broke a law: our bug, never the user's
    │   └── RoomError                  1   a schedule that the devices' memory does not hold
    ├── PlanError                      1   a plan broke a law: our bug, never the user's
    ├── RunError                       1   an operator failed on the values it was given
    ├── CaptureError                   1   CUDA or ORT refused a graph capture
    └── RankError                      1   a process of several died, hangs or differs

A message is one sentence: what, where, and what to do.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMELESS = re.compile(r"\b[Tt]he model\b(?!')")
"""How sentences call a model whose file they do not know."""


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def unforeseen(error: Exception) -> str:
    """What to say of an error that nobody raises on purpose."""
    text = " ".join(str(error).split())[:300] or "no message"
    return f"Unforeseen {type(error).__name__}: {text}; please report it."


def absent(path: str | os.PathLike[str]) -> str:
    """What to say of a path that is no file to read: how a sentence begins."""
    return f"'{path}' is no regular file" if is_special(path) else f"There is no file '{path}'"


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path is there, but neither a regular file nor a folder: a pipe, a device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let what is wrong with a model be said of its file, which not all that look at it know.

    Args:
        path: The file; within another file's, it has the last word.
    """
    try:
        yield
    except ModelError as error:
        if error.names_file or f"'{path}'" in str(error):
            error.names_file = True
            raise
        named = type(error)(_NAMELESS.sub(lambda _: f"'{path}'", str(error), count=1))
        named.names_file = True
        raise named from error


class OnnxschedError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class UsageError(OnnxschedError):
    """An option, an input file or a shape that does not fit."""

    exit_code = 2


class NumericsError(OnnxschedError):
    """Outputs differ by more than the tolerance."""

    exit_code = 3


class DeviceError(OnnxschedError):
    """A device was asked for that this machine can't offer."""

    exit_code = 4


class ModelError(OnnxschedError):
    """A model that can't be read, or holds something that is not supported."""

    exit_code = 5
    names_file = False
    """Whether the message says which file it is about; see `naming`."""


class AnnotationError(ModelError):
    """A model without a schedule, or with one that belongs to another model."""


class SlowerError(OnnxschedError):
    """A benchmark fell below the ratio it had to reach."""

    exit_code = 6


class ScheduleError(OnnxschedError):
    """A schedule broke a law of `check_schedule`."""


class RoomError(ScheduleError):
    """The devices' memory does not hold a schedule, or a model in any way that was tried."""


class PlanError(OnnxschedError):
    """An execution plan broke a law of `check_plan`."""


class RunError(OnnxschedError):
    """An operator failed on the values it was given."""


class CaptureError(OnnxschedError):
    """A stream capture was refused; the message carries the reason."""


class RankError(OnnxschedError):
    """A process of several died, hangs, failed or differs; the message names it."""
