"""One process of several: its part of a plan, run together with those of the other ranks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import onnx

from onnxsched_runtime.annotation import fingerprint
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import RankError, UsageError, reason_of
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.executors.threads import ThreadExecutor
from onnxsched_runtime.group import GlooLinks, Monitor, NcclLinks, Peers
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.ranks import on_device, split_plan, spread, transfers
from onnxsched_runtime.rendezvous import check_ranks
from onnxsched_runtime.session import library_versions
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.version import own_version


@dataclass(frozen=True)
class Membership:
    """How this process takes part in running a schedule."""

    peers: Peers
    rank_of: Mapping[Device, int]
    """The rank that owns each device of the schedule."""

    @property
    def device(self) -> Device:
        """What this rank lowers and runs on: on a GPU, the one that its launcher gives it."""
        first = min(d for d, rank in self.rank_of.items() if rank == self.peers.rank)
        return replace(first, index=local_rank()) if first.kind == "cuda" else first


@contextmanager
def joined(process_group: Any, timeout_s: float) -> Iterator[Peers]:
    """The ranks of a group, told why this one ends if it does before it is watched.

    Whoever loads a model does this first, so that all ranks count the same loads.

    Args:
        process_group: Of torch.distributed.
        timeout_s: How long another process may be silent, or take for one step.

    Raises:
        UsageError: This process is not in the group.
        RankError: The group's store does not answer.
    """
    peers = Peers(process_group, timeout_s)
    try:
        yield peers
    except BaseException as error:
        if not isinstance(error, RankError):  # else all have been told
            with suppress(RankError):
                peers.fail(f"Rank {peers.rank} failed: {reason_of(error)}")
        peers.close()
        raise


def member(
    devices: Sequence[Device], peers: Peers, device_ranks: Mapping[str, int] | None
) -> Membership:
    """Find out how this process takes part.

    Args:
        devices: Those of the schedule.
        peers: All ranks.
        device_ranks: The rank that owns each device; if None, they are divided evenly, in order.

    Raises:
        UsageError: There are more processes than devices, or a device has no process.
    """
    if device_ranks is None:
        return Membership(peers, spread(devices, peers.count))
    rank_of = {Device.parse(name): rank for name, rank in device_ranks.items()}
    if rank_of.keys() != set(devices) or set(rank_of.values()) != set(range(peers.count)):
        used = ", ".join(map(str, devices))
        raise UsageError(
            f"The devices {used} must each be given one of {peers.count} ranks, and each rank a "
            "device."
        )
    return Membership(peers, rank_of)


class RankExecutor:
    """Runs what a plan has for this rank; every rank runs as often as rank 0 does.

    Rank 0 takes the inputs and returns the outputs.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        model: onnx.ModelProto,
        membership: Membership,
        custom_ops: tuple[str, ...] = (),
        capture: Capture = "whole",
    ) -> None:
        """Check that all ranks are about to run the same, open sessions, and wait for the others.

        Args:
            source: The model that sessions are cut out of.
            plan: What all ranks run together.
            model: What makes ranks the same.
            membership: How this process takes part.
            custom_ops: Libraries of custom operators.
            capture: `whole` for a CUDA graph, where sends and receives allow that.

        Raises:
            UsageError: The schedule can't be run by several processes.
            RankError: A rank differs, died, or could not open its sessions.
        """
        peers, rank_of = membership.peers, membership.rank_of
        self.rank, self.rank_of = peers.rank, rank_of
        plans = split_plan(plan, rank_of, peers.count)
        check_ranks(plans)
        _require_runnable(plans, rank_of)
        peers.require_same(identity(model, plans))
        self._resources = ExitStack()
        self._peers, self._monitor = peers, Monitor(peers)
        try:
            self._executor: ThreadExecutor | StreamExecutor
            if membership.device.kind == "cuda":
                self._executor = self._streams(
                    source,
                    on_device(plans[self.rank], membership.device),
                    peers,
                    custom_ops,
                    capture,
                )
            else:
                tensors = [transfer.tensor for transfer in transfers(plan, rank_of)]
                self._executor = self._threads(
                    source, plans[self.rank], peers, custom_ops, tensors
                )
        except BaseException as error:
            verdict = self._monitor.verdict or self._monitor.fail_with(error)
            self.close()
            if isinstance(error, RankError):
                raise RankError(verdict) from error
            raise

    def _threads(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        peers: Peers,
        custom_ops: tuple[str, ...],
        tensors: Sequence[str],
    ) -> ThreadExecutor:
        links = GlooLinks(peers, self._monitor, source.tensors, tensors)
        self._resources.callback(links.close)
        executor = ThreadExecutor(source, plan, custom_ops, links, local_process_count())
        self._resources.enter_context(executor)
        self._monitor.wait_until_ready()
        return executor

    def _streams(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        peers: Peers,
        custom_ops: tuple[str, ...],
        capture: Capture,
    ) -> StreamExecutor:
        links = NcclLinks(peers, self._monitor)
        self._resources.callback(links.close)
        executor = StreamExecutor(source, plan, capture, custom_ops, links)
        return self._resources.enter_context(executor)

    @property
    def capture(self) -> str:
        """How this rank's part is captured."""
        return str(self._executor.capture)

    @property
    def refusal(self) -> str | None:
        """Why it is not captured as was asked for; None where it is."""
        return self._executor.refusal

    @property
    def failed(self) -> threading.Event:
        """Set when all ranks must end, even while this one can't be interrupted."""
        return self._monitor.failed

    @property
    def verdict(self) -> str | None:
        """Why all ranks must end; None while all is well."""
        return self._monitor.verdict

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run once, together with all other ranks.

        Args:
            feeds: On rank 0 a host value for every model input, elsewhere nothing.
            outputs: Names of model outputs, on rank 0.

        Raises:
            RankError: A rank died, hangs or failed; nothing runs any more.
        """
        with self._monitor.running(), ExitStack() as waits:
            if isinstance(self._executor, StreamExecutor):  # waits where no one sees for whom
                for rank in set(self.rank_of.values()) - {self.rank}:
                    waits.enter_context(self._monitor.waiting_for(rank))
            return self._executor.run(feeds, outputs)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """End all ranks for what goes wrong between runs; within one they are told anyway."""
        try:
            yield
        except BaseException as error:
            self._monitor.fail_with(error)
            raise

    def close(self) -> None:
        """Leave the others, once they need nothing more, and free sessions and threads."""
        with ExitStack() as ends:
            ends.callback(self._peers.close)
            ends.callback(self._resources.close)
            ends.callback(self._monitor.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_runnable(plans: Sequence[ExecutionPlan], rank_of: Mapping[Device, int]) -> None:
    """Check what GPUs allow; groups of CPU threads allow everything.

    Raises:
        UsageError: A rank owns several GPUs or none of the operators, or some run on the host.
    """
    if all(device.kind == "cpu" for device in rank_of):
        return
    if len(rank_of) > len(plans):
        raise UsageError(
            f"The schedule uses {len(rank_of)} GPUs; start as many processes, one for each."
        )
    for rank, plan in enumerate(plans):
        if not plan.segments:
            raise UsageError(f"Rank {rank} has nothing to run; optimize again for fewer devices.")
        if not all(piece.captured for piece in plan.pieces):
            raise UsageError(
                "Part of the model runs on the host, which several processes with GPUs can't "
                "share; load it in one process."
            )


def identity(model: onnx.ModelProto, plans: Sequence[ExecutionPlan]) -> dict[str, str]:
    """What all ranks must agree on, by what it is, each on one line."""
    content = hashlib.sha256(fingerprint(model).encode())
    for weight in model.graph.initializer:  # one by one: a message ends at 2 GiB
        content.update(weight.SerializeToString(deterministic=True))
    return {
        "version of onnxsched": own_version(),
        "version of ONNX Runtime": library_versions()["onnxruntime"],
        "model": content.hexdigest()[:12],
        "schedule": hashlib.sha256(repr(plans).encode()).hexdigest()[:12],
    }


def local_rank() -> int:
    """The number of this process among torchrun's on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_process_count() -> int:
    """How many of torchrun's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
