"""The members of a process group, and the store that they leave messages in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from onnxsched_runtime.errors import RankError, UsageError
from onnxsched_runtime.group.binding import torch_module
from onnxsched_runtime.group.store import SILENCE, Store

FOREVER = timedelta(days=365)
"""Rank 0 may take its time between runs; the monitor says when waiting is over."""
_POLL_S = 0.02
_opened: Counter[str] = Counter()
"""Sessions that this process has opened, by who takes part: they open them in the same order."""


class Peers:
    """This process among the ranks of a group, with a corner of their store of their own."""

    def __init__(self, process_group: Any, timeout_s: float) -> None:
        """Find out who takes part.

        Args:
            process_group: Of torch.distributed, initialized.
            timeout_s: How long to wait for a message.

        Raises:
            UsageError: This process is not in the group.
            RankError: The group's store does not answer.
        """
        distributed = torch_module().distributed
        self.rank: int = distributed.get_rank(process_group)
        if self.rank < 0:
            raise UsageError("This process is not in the process group; only members can load.")
        self.members: list[int] = distributed.get_process_group_ranks(process_group)
        """The rank of each in the world, by its rank here."""
        self.timeout_s = timeout_s
        group = "-".join(map(str, self.members))
        self._corner = f"onnxsched/{group}/{_opened[group]}"
        _opened[group] += 1
        self._store = Store(self._own_store(), timeout_s)

    def _own_store(self) -> Any:
        """A connection to the store that no one else waits on, and keeps busy while waiting."""
        distributed = torch_module().distributed
        try:
            store = distributed.distributed_c10d._get_default_store().clone()
        except RuntimeError as error:
            raise RankError(SILENCE) from error
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return distributed.PrefixStore(self._corner, store)

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    def tell(self, key: str, value: str) -> None:
        """Leave a message for all.

        Raises:
            RankError: The store does not answer, here and in what follows.
        """
        self._store.ask("set", f"{key}/{self.rank}", value)

    def heard(self, key: str, rank: int) -> str | None:
        """The last message of a rank; None where there is none."""
        return self._read(f"{key}/{rank}")

    def fail(self, sentence: str) -> str:
        """Say why all must end; returns what the first one to do so said."""
        return str(self._store.ask("compare_set", "failure", "", sentence).decode())

    @property
    def failure(self) -> str | None:
        """Why all must end; None while all is well."""
        return self._read("failure")

    def _read(self, name: str) -> str | None:
        if not self._store.ask("check", [name]):
            return None
        return str(self._store.ask("get", name).decode())

    def close(self) -> None:
        """Let go of the store; nothing is told or heard any more."""
        self._store.close()

    def exchange(self, key: str, value: str) -> list[str]:
        """Tell a value and hear those of all ranks.

        Raises:
            RankError: One does not come in time.
        """
        self.tell(key, value)
        told = self._all(key)
        self.tell(f"{key}-heard", "")
        if self.rank == 0:  # which may keep the store, and must not leave before all have heard
            self._all(f"{key}-heard")
        return told

    def _all(self, key: str) -> list[str]:
        end = time.monotonic() + self.timeout_s
        while True:
            if sentence := self.failure:
                raise RankError(sentence)
            heard = [self.heard(key, rank) for rank in range(self.count)]
            if None not in heard:
                return [message for message in heard if message is not None]
            if time.monotonic() > end:
                rank = heard.index(None)
                raise RankError(
                    self.fail(f"Rank {rank} has not come within {self.timeout_s:g} s.")
                )
            time.sleep(_POLL_S)

    def require_same(self, identity: Mapping[str, str]) -> None:
        """Check that all ranks are about to run the same.

        Args:
            identity: What must be the same, by what it is.

        Raises:
            RankError: A rank differs from most others, from rank 0 where there are as many.
        """
        names = list(identity)
        told = self.exchange("identity", "\n".join(identity.values()))
        if len(set(told)) == 1:
            return
        counts = Counter(told)
        usual = max(told, key=lambda message: counts[message])
        rank = next(rank for rank, message in enumerate(told) if message != usual)
        own, other = told[rank].split("\n"), usual.split("\n")
        name, found, wanted = next(
            each for each in zip(names, own, other, strict=True) if each[1] != each[2]
        )
        raise RankError(
            f"Rank {rank} has another {name} ({found}) than rank {told.index(usual)} ({wanted}); "
            "give every rank the same."
        )

    def nccl_group(self) -> Any:
        """A group of all ranks over NCCL, which nothing else sends through.

        Raises:
            UsageError: This torch has no NCCL.
        """
        distributed = torch_module().distributed
        if not distributed.is_nccl_available():
            raise UsageError("This torch has no NCCL, which GPUs need; install one that has.")
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = FOREVER  # else torch ends the process when rank 0 takes its time
        return distributed.ProcessGroupNCCL(self._own_store(), self.rank, self.count, options)

    def gloo_group(self) -> Any:
        """A group of all ranks over gloo, which nothing else sends through.

        Raises:
            RankError: They can't be connected in time.
        """
        timeout = timedelta(seconds=1.2 * self.timeout_s)  # so that the monitor finds out first
        kind = torch_module().distributed.ProcessGroupGloo
        try:
            return kind(self._own_store(), self.rank, self.count, timeout)
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            raise RankError(
                f"Rank {self.rank} can't connect to the others ({first_line})."
            ) from error
