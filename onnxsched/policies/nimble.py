"""Nimble: as few streams and synchronizations as full concurrency allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.matching import maximum_matching
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.reachability import levels, transitive_reduction
from onnxsched.schedule import Schedule
from onnxsched.streams import fold_streams, schedule_chains


def nimble(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Nimble's stream assignment on the first device, launched by decreasing upward rank.

    Kwon et al., "Nimble" (NeurIPS 2020): a maximum matching in the transitive reduction cuts the
    graph into the fewest chains along its edges, so that operators that can run at the same time
    are never on one stream and the fewest synchronizations are needed. Like Nimble's code, chains
    then reuse the streams of chains that have ended. Where the machine has too few streams even
    so, the chains are folded onto those it has. That is known beforehand where a level has more
    operators than there are streams. Reduction, matchings O(sqrt(n) * (n + edges)), and folding.
    """
    device = machine.devices[0]
    order = rank_order(upward_ranks_us(graph, cost, device))
    links = chain_links(graph)
    if max(Counter(levels(graph)).values(), default=0) <= machine.stream_count:
        reused = schedule_chains(order, {**links, **reuse_links(graph, links)}, device)
        if reused.stream_count <= machine.stream_count:
            return reused
    chains = schedule_chains(order, links, device)
    return fold_streams(graph, cost, chains, machine.stream_count)


@lru_cache(maxsize=1)  # The same for every number of streams.
def chain_links(graph: OperatorGraph) -> Mapping[int, int]:
    """The operator that follows each in its chain, for as few chains as edges allow."""
    operators = range(len(graph))
    # Entering an operator and leaving it are two vertices, so that no path is longer than an edge.
    leaving = [[w + len(graph) for w in followers] for followers in transitive_reduction(graph)]
    matching = maximum_matching(
        [*leaving, *([] for _ in operators)], operators, range(len(graph), 2 * len(graph))
    )
    return {v: entered - len(graph) for v, entered in matching.items()}


def reuse_links(graph: OperatorGraph, links: Mapping[int, int]) -> dict[int, int]:
    """Links from the ends of chains to the starts of chains that can reuse their streams.

    A second matching, this time in the transitive closure: a chain follows another where the end
    of one reaches the start of the other, so no concurrency is lost. The last ends, which have
    the fewest starts to choose from, choose first.
    """
    followers = set(links.values())
    ends = [v for v in reversed(range(len(graph))) if v not in links]
    starts = [v for v in range(len(graph)) if v not in followers]
    return maximum_matching(graph.successors, ends, starts)
