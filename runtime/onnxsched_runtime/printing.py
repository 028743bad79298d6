"""The streams that commands print to: they may be closed, full or broken, or speak ASCII."""

from __future__ import annotations

import os
import sys


def prepare_streams() -> None:
    """Let both streams take whatever is printed, if the caller closed them or they speak ASCII."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open to the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def unwritten(error: OSError) -> str:
    """What to say where stdout takes no more; nothing if its reader has left."""
    if isinstance(error, BrokenPipeError):
        return ""
    return f"The result can't be written to stdout ({error.strerror})."
