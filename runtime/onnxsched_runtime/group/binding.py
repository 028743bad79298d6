"""torch.distributed, imported at first use, and joining it as torchrun asks to."""

from __future__ import annotations

import contextlib
import functools
import os
from datetime import timedelta
from typing import Any

from onnxsched_runtime.errors import RankError, UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets."""


@functools.cache
def torch_module() -> Any:
    """The module torch.

    Raises:
        UsageError: It is built without torch.distributed.
    """
    import torch as module

    if not module.distributed.is_available():
        raise UsageError("This torch is built without torch.distributed; install another.")
    return module


def joined_process_group(timeout_s: float) -> Any:
    """The group of all processes that torchrun started, joined by this one.

    Args:
        timeout_s: How long to wait for the others.

    Raises:
        UsageError: This process was not started by torchrun.
        RankError: Not all of them came.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"{missing[0]} is not set; start with `torchrun --nproc-per-node N -m "
            "onnxsched_runtime.distributed MODEL`."
        )
    # It warns of each lost connection, and shows its stack where nobody is at the address.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    distributed = torch_module().distributed
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        rank, first_line = os.environ["RANK"], str(error).splitlines()[0]
        raise RankError(f"Rank {rank} can't join the others ({first_line}).") from error
    return distributed.group.WORLD


def leave_process_group() -> None:
    """End what `joined_process_group` began, once all are done: rank 0 may keep the store."""
    distributed = torch_module().distributed
    with contextlib.suppress(RuntimeError):  # someone has left already, with nothing to wait for
        distributed.barrier()
    distributed.destroy_process_group()
