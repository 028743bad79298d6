"""torch.distributed, imported at first use, and joining it as torchrun asks to."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from onnxsched_runtime.errors import RankError, UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets."""
_CAME = "onnxsched/came/"
"""Before the number of a rank, in the store: it has come."""
_POLL_S = 0.05
_HEARING_S = 1.0
_LONGEST_S = 1e6


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


def require_timeout(name: str, timeout_s: float) -> None:
    """Check how long others are to be waited for.

    Raises:
        UsageError: It is no time that has an end.
    """
    if not 0 < timeout_s < _LONGEST_S:
        raise UsageError(f"{name} {timeout_s} is no time that can be waited for.")


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
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    _number("MASTER_PORT", 1, 65535)
    if rank >= size:
        raise UsageError(f"RANK {rank} is none of WORLD_SIZE {size} ranks, which start at 0.")
    # It warns of each lost connection, and shows its stack where nobody is at the address.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    distributed = torch_module().distributed
    try:
        store = _store_of_all(rank, size, timeout_s)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RankError(f"Rank {rank} can't join the others ({first_line}).") from error
    return distributed.group.WORLD


def _number(variable: str, least: int, most: int = 1 << 20) -> int:
    text = os.environ[variable]
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UsageError(f"{variable} is '{text}', which is no number from {least} to {most}.")
    return int(text)


def _store_of_all(rank: int, size: int, timeout_s: float) -> Any:
    """The store at the address in the environment, once all ranks have come to it.

    torch's own way there waits for them too, but can't say who is missing.
    """
    store = torch_module().distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=_keeps_store(rank),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    store.set(f"{_CAME}{rank}", "")
    end_s = time.monotonic() + timeout_s
    missing = [other for other in range(size) if other != rank]
    try:
        while missing := [other for other in missing if not store.check([f"{_CAME}{other}"])]:
            if time.monotonic() > end_s:
                raise _not_all(rank, missing, f"within {timeout_s:g} s")
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise _not_all(rank, missing, "before the store of the process group ended") from error
    return store


def _keeps_store(rank: int) -> bool:
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _not_all(rank: int, missing: Sequence[int], when: str) -> RankError:
    names = ", ".join(map(str, missing))
    ranks = "rank" if len(missing) == 1 else "ranks"
    return RankError(f"Rank {rank} can't join the others: {ranks} {names} did not come {when}.")


@contextmanager
def heard_by_others() -> Iterator[None]:
    """What goes wrong within leaves the others time to read why all must end.

    That is in the store, which may end with this process; each rank looks every half second.
    """
    try:
        yield
    except BaseException:
        if _keeps_store(int(os.environ["RANK"])):
            time.sleep(_HEARING_S)
        raise


def leave_process_group() -> None:
    """End what `joined_process_group` began, once all are done: rank 0 may keep the store."""
    distributed = torch_module().distributed
    with contextlib.suppress(RuntimeError):  # someone has left already, with nothing to wait for
        distributed.barrier()
    distributed.destroy_process_group()
