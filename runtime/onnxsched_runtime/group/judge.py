"""Who is to blame when ranks wait: from what each says of itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank says of itself."""

    is_ready: bool = False
    """Whether it has opened its sessions."""
    is_closed: bool = False
    run: int = 0
    """How many runs it has begun."""
    is_running: bool = False
    is_busy: bool = False
    """Whether one of its streams computes."""
    waits_for: tuple[int, ...] = ()
    """The ranks that its streams wait for."""
    step: int = 0
    """How many steps it has done in all."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What is known of a rank."""

    state: RankState
    silent_s: float
    """Since it last gave a sign of life."""
    unchanged_s: float
    """Since its state last changed."""


def judge(ranks: Sequence[Sighting], begun_s: float, timeout_s: float) -> str | None:
    """Find the rank that keeps the others waiting too long, if there is one.

    Rank 0 begins each run, since it has the inputs; how long it takes to do so is up to its
    caller. From then on all ranks are due, and one that neither gets on nor waits for another is
    to blame. A rank that loads or computes in silence still gives signs of life.

    Args:
        ranks: What is known of each.
        begun_s: Since rank 0 began its last run.
        timeout_s: How long a rank may be silent, or take for a step.

    Returns:
        A sentence that names the rank; None while all is well.
    """
    for rank, seen in enumerate(ranks):
        if seen.silent_s >= timeout_s and not seen.state.is_closed:
            return f"Rank {rank} has given no sign of life for {timeout_s:g} s; it died or hangs."
    due = {
        rank: min(seen.unchanged_s, begun_s)
        for rank, seen in enumerate(ranks)
        if _is_due(seen.state, ranks[0].state)
    }
    late = [rank for rank, late_s in due.items() if late_s >= timeout_s]
    for rank in late:
        state, run = ranks[rank].state, ranks[0].state.run
        if not state.is_running:
            return f"Rank {rank} has not joined run {run} for {timeout_s:g} s; it hangs."
        if state.is_busy or not state.waits_for:
            return f"Rank {rank} has not got on in run {run} for {timeout_s:g} s; it hangs."
    if late and len(late) == len(due):
        rank, peer = late[0], ranks[late[0]].state.waits_for[0]
        return (
            f"Rank {rank} has waited for rank {peer} for {timeout_s:g} s, and all others wait "
            "too; check the network between them."
        )
    return None


def _is_due(state: RankState, first: RankState) -> bool:
    """Whether a rank has something to do in a run that rank 0 has begun."""
    return all((first.is_ready, state.is_ready)) and (
        state.run < first.run or (state.run == first.run and state.is_running)
    )
