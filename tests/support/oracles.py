"""Slow or borrowed ways to the right answer."""

from __future__ import annotations

from itertools import combinations

import networkx as nx

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.schedule import Schedule
from onnxsched_runtime.device import Device, Placement


def digraph(graph: OperatorGraph) -> nx.DiGraph:
    """The same graph in networkx."""
    mirror = nx.DiGraph()
    mirror.add_nodes_from(range(len(graph)))
    mirror.add_edges_from((edge.producer, edge.consumer) for edge in graph.edges)
    return mirror


def critical_path_us(graph: OperatorGraph, cost: CostModel, device: Device) -> float:
    """The longest path, with each duration on the edges that leave its operator."""
    mirror = digraph(graph)
    mirror.add_node("end")
    for operator in range(len(graph)):
        mirror.add_edge(operator, "end")
    for operator, _, attributes in mirror.edges(data=True):
        attributes["weight"] = cost.operator(operator, device).duration_us
    return float(nx.dag_longest_path_length(mirror))


def independent_pairs(graph: OperatorGraph) -> set[tuple[int, int]]:
    """Pairs of operators, lower index first, that may run at the same time."""
    closure = nx.transitive_closure_dag(digraph(graph))
    return {pair for pair in combinations(range(len(graph)), 2) if not closure.has_edge(*pair)}


def pairs_on_one_stream(schedule: Schedule) -> set[tuple[int, int]]:
    """Pairs of operators, lower index first, that share a stream."""
    placement_of = schedule.placement_of
    return {
        pair
        for pair in combinations(sorted(placement_of), 2)
        if placement_of[pair[0]] == placement_of[pair[1]]
    }


def minimum_chain_count(graph: OperatorGraph) -> int:
    """The fewest paths along edges of the transitive reduction that hold each operator once.

    Tries every set of edges that enters and leaves each operator at most once. Exponential.
    """
    links = list(nx.transitive_reduction(digraph(graph)).edges)

    def most_links(position: int, left: frozenset[int], entered: frozenset[int]) -> int:
        if position == len(links):
            return 0
        u, v = links[position]
        without = most_links(position + 1, left, entered)
        if u in left or v in entered:
            return without
        return max(without, 1 + most_links(position + 1, left | {u}, entered | {v}))

    return len(graph) - most_links(0, frozenset(), frozenset())


def is_topological(graph: OperatorGraph, order: list[int]) -> bool:
    """Whether each operator is there once, after all it reads from."""
    position_of = {operator: position for position, operator in enumerate(order)}
    return sorted(order) == list(range(len(graph))) and all(
        position_of[edge.producer] < position_of[edge.consumer] for edge in graph.edges
    )


def heft(graph: OperatorGraph, cost: CostModel, machine: Machine) -> dict[int, Placement]:
    """Where HEFT puts each operator, by trying all starts on all streams."""
    placed: dict[int, tuple[float, float, Placement]] = {}
    for operator in rank_order(upward_ranks_us(graph, cost, *machine.devices)):
        inputs = [(placed[e.producer], e.nbytes) for e in graph.incoming[operator]]
        last = max(graph.predecessors[operator], key=lambda p: placed[p][1], default=None)
        options = []
        for placement in machine.placements:
            ready_us = max(
                (
                    finish_us + cost.transfer_us(nbytes, source.device, placement.device)
                    for (_, finish_us, source), nbytes in inputs
                ),
                default=0.0,
            )
            length_us = cost.operator(operator, placement.device).duration_us
            busy = [(a, b) for a, b, where in placed.values() if where == placement]
            start_us = min(
                start_us
                for start_us in (ready_us, *(b for _, b in busy))
                if start_us >= ready_us
                and all(start_us + length_us <= a or b <= start_us for a, b in busy)
            )
            is_elsewhere = last is None or placement != placed[last][2]
            options.append((start_us + length_us, is_elsewhere, placement, start_us))
        finish_us, _, placement, start_us = min(options)
        placed[operator] = (start_us, finish_us, placement)
    return {operator: placement for operator, (_, _, placement) in placed.items()}
