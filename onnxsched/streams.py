"""From chains of operators to the streams of one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.reachability import descendants
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device, Placement


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
    Only once `stream_count` streams are open does it share the one that is free first.
    O((edges + chains * stream_count) * n / word size).
    """
    chains: dict[Placement, list[int]] = {}
    for slot in schedule.slots:
        chains.setdefault(slot.placement, []).append(slot.operator)
    timeline = simulate(graph, cost, schedule)
    reach = descendants(graph)
    folded: dict[Placement, Placement] = {}
    free_us: list[float] = []
    reached_by_all: list[int] = []
    for placement, chain in chains.items():
        head, tail = chain[0], chain[-1]
        lossless = [s for s, reached in enumerate(reached_by_all) if reached >> head & 1]
        if lossless:
            stream = max(lossless, key=free_us.__getitem__)
        elif len(free_us) < stream_count:
            stream = len(free_us)
            free_us.append(0.0)
            reached_by_all.append(-1)
        else:
            stream = min(range(stream_count), key=free_us.__getitem__)
        work_us = sum(timeline.finishes_us[v] - timeline.starts_us[v] for v in chain)
        free_us[stream] = max(free_us[stream] + work_us, timeline.finishes_us[tail])
        reached_by_all[stream] &= reach[tail]
        folded[placement] = Placement(placement.device, stream)
    return Schedule(tuple(Slot(slot.operator, folded[slot.placement]) for slot in schedule.slots))
