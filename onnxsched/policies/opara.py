"""Opara: a greedy path cover for streams, and a launch order that mixes operator classes."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from onnxsched.cost import Bound, CostModel, OperatorCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.schedule import Schedule
from onnxsched.streams import fold_streams, schedule_chains


def opara(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Opara's launch order and streams on the first device.

    Both algorithms of Chen et al., "Opara" (IEEE TC 2025, arXiv 2312.10351), then its unlimited
    streams are folded onto those the machine has. Algorithm 1 asks for any topological order; it
    gets the launch order, so that of several consumers the one launched first goes on without
    waiting for an event. O(n log n + edges), and folding.
    """
    device = machine.devices[0]
    order = launch_order(graph, [cost.operator(v, device) for v in range(len(graph))])
    chains = schedule_chains(order, path_cover(graph, order), device)
    return fold_streams(graph, cost, chains, machine.stream_count)


def launch_order(graph: OperatorGraph, costs: Sequence[OperatorCost]) -> list[int]:
    """Opara's Algorithm 2: alternate between compute-bound and memory-bound operators.

    Of the ready operators that are not bound as the last one was (the first is compute-bound), or
    of all where there is only one kind, take the one with the smallest blocks; ties go to the one
    ready first. O(n log n + edges).
    """
    ready: dict[Bound, list[tuple[float, int, int]]] = {"compute": [], "memory": []}
    arrival_count = 0

    def arrive(operator: int) -> None:
        nonlocal arrival_count
        cost = costs[operator]
        heappush(ready[cost.bound], (cost.block_share, arrival_count, operator))
        arrival_count += 1

    missing = [len(predecessors) for predecessors in graph.predecessors]
    for operator, count in enumerate(missing):
        if count == 0:
            arrive(operator)
    order: list[int] = []
    turn: Bound = "compute"
    while ready["compute"] or ready["memory"]:
        bound = turn if ready[turn] else _other(turn)
        operator = heappop(ready[bound])[-1]
        order.append(operator)
        turn = _other(bound)
        for successor in graph.successors[operator]:
            missing[successor] -= 1
            if missing[successor] == 0:
                arrive(successor)
    return order


def path_cover(graph: OperatorGraph, order: Sequence[int]) -> dict[int, int]:
    """Opara's Algorithm 1: the operator that goes on with each operator's stream.

    Each operator, in topological `order`, takes over the stream of its first predecessor that has
    not handed it on yet, or opens a new one. O(n + edges).
    """
    handed_on_to: dict[int, int] = {}
    for operator in order:
        for predecessor in graph.predecessors[operator]:
            if predecessor not in handed_on_to:
                handed_on_to[predecessor] = operator
                break
    return handed_on_to


def _other(bound: Bound) -> Bound:
    return "memory" if bound == "compute" else "compute"
