"""That no process waits for another for ever: the law that the plans of all ranks keep. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.plan import ExecutionPlan, Receive, Send

_Link = tuple[int, int, str]
"""The rank that sends, the one that receives, the tensor."""


def check_ranks(plans: Sequence[ExecutionPlan]) -> None:
    """Check that the plans of all ranks, run together, come to their end.

    The laws: every Send has exactly one Receive, and every Receive one Send; each rank receives
    from another in the order in which that sends; and the steps of all ranks are ordered without
    a circle where a Send and its Receive happen at once. That is asked of a rank that issues its
    steps one by one and waits for each. Streams wait for less: whatever order `check_plan` allows
    is part of the order of issue. O(transfers).

    Args:
        plans: By rank; each passes `check_plan`.

    Raises:
        PlanError: names the first tensor or ranks that break a law.
    """
    links = [_links(plan, rank) for rank, plan in enumerate(plans)]
    _check_pairs(links)
    place = [0] * len(plans)
    waiting = list(range(len(plans)))
    while waiting:
        rank = waiting.pop()
        if place[rank] == len(links[rank]):
            continue
        source, target, _ = link = links[rank][place[rank]]
        peer = source + target - rank
        if place[peer] < len(links[peer]) and links[peer][place[peer]] == link:
            place[rank] += 1
            place[peer] += 1
            waiting += [rank, peer]
    for rank, done in enumerate(place):
        if done < len(links[rank]):
            source, target, tensor = links[rank][done]
            peer = source + target - rank
            verb = "receive" if rank == source else "send"
            raise PlanError(f"Rank {rank} waits for ever for rank {peer} to {verb} '{tensor}'.")


def _links(plan: ExecutionPlan, rank: int) -> list[_Link]:
    """What a rank sends and receives, in the order of issue."""
    links = []
    for step in (step for piece in plan.pieces for step in piece.steps):
        if isinstance(step, Send):
            links.append((rank, step.rank, step.tensor))
        elif isinstance(step, Receive):
            links.append((step.rank, rank, step.tensor))
    return links


def _check_pairs(links: Sequence[Sequence[_Link]]) -> None:
    sent: dict[tuple[int, int], list[str]] = {}
    received: dict[tuple[int, int], list[str]] = {}
    for rank, own in enumerate(links):
        for source, target, tensor in own:
            if source == target or not (0 <= source < len(links) and 0 <= target < len(links)):
                raise PlanError(f"'{tensor}' can't go from rank {source} to rank {target}.")
            side = sent if rank == source else received
            side.setdefault((source, target), []).append(tensor)
    for source, target in sorted(sent.keys() | received.keys()):
        ours, theirs = sent.get((source, target), []), received.get((source, target), [])
        if ours != theirs:
            raise PlanError(
                f"Rank {source} sends {ours} to rank {target}, which receives {theirs}."
            )
        if len(set(ours)) < len(ours):
            raise PlanError(f"Rank {source} sends a tensor twice to rank {target}.")
