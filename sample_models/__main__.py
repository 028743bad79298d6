"""`python -m sample_models` is the command; the process ends in one sentence and an exit code."""

import contextlib
import os
import signal
import sys
from typing import NoReturn

_INTERRUPTED = 130
_UNWRITTEN = 1


def _run() -> NoReturn:
    """Runs the command and ends the process at once: all is written and closed by then."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    if is_default:
        signal.signal(signal.SIGINT, _end_interrupted)  # extensions would wrap what is raised
    from sample_models.command import main

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        try:
            main(sys.argv[1:])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _end_interrupted()
    except BrokenPipeError:  # the reader has left
        _end(_UNWRITTEN)
    except OSError as error:
        _end(_UNWRITTEN, f"cannot write to stdout: {error.strerror}; make room there")
    _end(code)


def _end_interrupted(*_: object) -> NoReturn:
    _end(_INTERRUPTED, "interrupted; nothing was written")


def _end(code: int, sentence: str = "") -> NoReturn:
    with contextlib.suppress(OSError):  # the exit code says it, too
        if sentence and sys.stderr is not None:
            print(f"sample_models: {sentence}.", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    _run()
