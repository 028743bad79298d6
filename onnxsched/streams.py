"""From chains of operators to the streams of one device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from onnxsched.cost import Contention, CostModel, OperatorCost, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.reachability import blocks, reached_targets
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, simulate
from onnxsched_runtime.device import Device, Placement

_MOST_PAIRS = 20_000_000
"""Of operators side by side that are simulated with what they cost each other: two seconds."""


def schedule_chains(order: Sequence[int], links: Mapping[int, int], device: Device) -> Schedule:
    """Give each chain a stream of its own, as many as there are chains. O(n).

    Args:
        order: the launch order, topological.
        links: for an operator the one that follows it in its chain, absent at the end of a chain.
        device: where all of them run.
    """
    stream_of: dict[int, int] = {}
    stream_count = 0
    for operator in order:
        if operator not in stream_of:
            stream_of[operator] = stream_count
            stream_count += 1
        if operator in links:
            stream_of[links[operator]] = stream_of[operator]
    return Schedule(
        tuple(Slot(operator, Placement(device, stream_of[operator])) for operator in order)
    )


def fold_streams(
    graph: OperatorGraph, cost: CostModel, schedule: Schedule, stream_count: int
) -> Schedule:
    """Put the streams of a one-device schedule on at most `stream_count`, keeping launch order.

    Chains, one per stream of `schedule`, are taken in launch order of their heads. A chain reuses
    a stream where it comes after the tails of all chains there anyway (of several, the one free
    last), otherwise it opens a new stream; so operators that can run at the same time stay apart.
    Only once `stream_count` streams are open does it share the one that is free first. How long
    chains take is what `_unfolded` says.
    O((edges + chains * stream_count) * chains / word size), and about n KiB of memory.
    """
    chains: dict[Placement, list[int]] = {}
    for slot in schedule.slots:
        chains.setdefault(slot.placement, []).append(slot.operator)
    chain_from = {chain[0]: chain for chain in chains.values()}
    placement_of = schedule.placement_of
    costs = tuple(cost.operator(v, placement_of[v].device) for v in range(len(graph)))
    timeline = _unfolded(graph, costs, cost.contention, schedule)
    stream_of: dict[int, int] = {}
    free_us: list[float] = []
    tails: list[list[int]] = []  # Of each stream those that a chain must follow to reuse it.
    for heads in blocks(list(chain_from)):
        reached = reached_targets(graph, heads)
        reached_by_all = [_intersection(reached, of_stream) for of_stream in tails]
        for bit, head in enumerate(heads):
            chain = chain_from[head]
            lossless = [s for s, found in enumerate(reached_by_all) if found >> bit & 1]
            if lossless:
                stream = max(lossless, key=free_us.__getitem__)
                tails[stream] = []  # They reach whatever the new tail does.
            elif len(free_us) < stream_count:
                stream = len(free_us)
                free_us.append(0.0)
                tails.append([])
                reached_by_all.append(-1)
            else:
                stream = min(range(stream_count), key=free_us.__getitem__)
            work_us = sum(timeline.finishes_us[v] - timeline.starts_us[v] for v in chain)
            free_us[stream] = max(free_us[stream] + work_us, timeline.finishes_us[chain[-1]])
            tails[stream].append(chain[-1])
            reached_by_all[stream] &= reached[chain[-1]]
            stream_of.update(dict.fromkeys(chain, stream))
    return Schedule(
        tuple(
            Slot(slot.operator, Placement(slot.placement.device, stream_of[slot.operator]))
            for slot in schedule.slots
        )
    )


@lru_cache(maxsize=1)  # The same for every number of streams.
def _unfolded(
    graph: OperatorGraph,
    costs: tuple[OperatorCost, ...],
    contention: Contention,
    schedule: Schedule,
) -> Timeline:
    """When operators run on one device with a stream for each chain, all side by side.

    Without slow-downs where more than `_MOST_PAIRS` operators start beside one that runs: it takes
    a step for each, and no machine runs as many. O(n log n + edges + `_MOST_PAIRS`).
    """
    overheads = replace(contention, sm_slowdown=0.0, launch_slowdown=0.0)
    apart = simulate(graph, TableCost(costs, overheads), schedule)
    ends_us = sorted(apart.finishes_us)
    pair_count = sum(
        started - bisect_right(ends_us, start_us)
        for started, start_us in enumerate(sorted(apart.starts_us))
    )
    if pair_count > _MOST_PAIRS or not contention.slows:
        return apart
    return simulate(graph, TableCost(costs, contention), schedule)


def _intersection(reached: Sequence[int], operators: Sequence[int]) -> int:
    """What all of the operators reach."""
    common = -1
    for operator in operators:
        common &= reached[operator]
        if not common:
            break
    return common
