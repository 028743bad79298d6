"""`torchrun --nproc-per-node N -m onnxsched_runtime.distributed MODEL`: one schedule, N processes.

Rank 0 has the inputs, the outputs and the result; the others only say what goes wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from onnxsched_runtime.distributed.ending import (
    INTERRUPTED,
    end,
    end_when_asked,
    end_when_interrupted,
    ignore_interrupts,
)
from onnxsched_runtime.errors import OnnxschedError, unforeseen
from onnxsched_runtime.printing import prepare_streams

if TYPE_CHECKING:
    from onnxsched_runtime.executors.ranks import RankExecutor


def main(arguments: Sequence[str]) -> NoReturn:
    """Run as one process of several, and end it."""
    held: list[RankExecutor] = []
    prepare_streams()
    end_when_interrupted()
    end_when_asked(held)
    code, sentence = run(arguments, held)
    ignore_interrupts()  # a launcher hands on what all have had
    end(code, sentence)


def run(arguments: Sequence[str], held: list[RankExecutor]) -> tuple[int, str]:
    """Run as one process of several.

    Args:
        arguments: Of the command line.
        held: Filled with what it runs, once that is loaded.

    Returns:
        The exit code, and what to say, if anything.
    """
    try:
        from onnxsched_runtime.distributed.command import obey  # which takes half a second

        obey(arguments, held)
    except OnnxschedError as error:
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as asked:  # by --help
        return (asked.code if isinstance(asked.code, int) else 1), ""
    except Exception as error:
        return 1, unforeseen(error)
    return 0, ""
