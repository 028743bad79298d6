"""Nimble: as few streams and synchronizations as full concurrency allows."""

from __future__ import annotations

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.matching import maximum_matching
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched.reachability import descendants, transitive_reduction
from onnxsched.schedule import Schedule
from onnxsched.streams import fold_streams, schedule_chains


def nimble(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """Nimble's stream assignment on the first device, launched by decreasing upward rank.

    Kwon et al., "Nimble" (NeurIPS 2020): a maximum matching in the transitive reduction cuts the
    graph into the fewest chains along its edges, so that operators that can run at the same time
    are never on one stream and the fewest synchronizations are needed. Like Nimble's code, chains
    then reuse the streams of chains that have ended. Where the machine has too few streams even
    so, the chains are folded onto those it has. O(n^2.5 / word size).
    """
    device = machine.devices[0]
    order = rank_order(upward_ranks_us(graph, cost, device))
    reach = descendants(graph)
    chain_links = maximum_matching(transitive_reduction(graph, reach))
    reused = schedule_chains(order, chain_links | reuse_links(reach, chain_links), device)
    if reused.stream_count <= machine.stream_count:
        return reused
    chains = schedule_chains(order, chain_links, device)
    return fold_streams(graph, cost, chains, machine.stream_count)


def reuse_links(reach: tuple[int, ...], chain_links: dict[int, int]) -> dict[int, int]:
    """Links from the ends of chains to the starts of chains that can reuse their streams.

    A second matching, this time in the transitive closure: a chain follows another where the end
    of one reaches the start of the other, so no concurrency is lost.
    """
    starts = (1 << len(reach)) - 1
    for follower in chain_links.values():
        starts ^= 1 << follower
    return maximum_matching(
        [0 if v in chain_links else reached & starts for v, reached in enumerate(reach)]
    )
