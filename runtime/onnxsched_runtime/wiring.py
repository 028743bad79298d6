"""How captured runs become one graph: which node waits for which. Pure.

A run of several segments in one session is captured as a chain of nodes, with a mark between
neighbouring segments. Marks and all else that does no work are resolved away: what waited for
them waits for the work before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from onnxsched_runtime.errors import PlanError


@dataclass(frozen=True, slots=True)
class ChainNode:
    """A node of a captured run."""

    predecessors: tuple[int, ...]
    """Indices of earlier nodes of the same run."""
    mark: int | None = None
    """The boundary that it stands for: 1 after the first segment, and so on."""
    is_work: bool = True
    """False for what only the capture needs."""


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A boundary between the segments of a run: 0 is its start, the number of segments its end."""

    chain: int
    boundary: int


@dataclass(frozen=True, slots=True)
class WiredNode:
    """A node of the graph."""

    chain: int
    index: int
    """Of its node in the chain."""
    predecessors: tuple[int, ...]
    """Positions in the graph's node order."""


_Key = tuple[int, int, int]
"""Launch position of the segment, chain, node."""


@dataclass
class _Vertices:
    """The nodes of all chains and both sides of all boundaries, before any are resolved away."""

    sources: list[list[int]] = field(default_factory=list)
    keys: list[_Key] = field(default_factory=list)
    work: list[tuple[int, int] | None] = field(default_factory=list)

    def add(self, key: _Key, sources: list[int], work: tuple[int, int] | None = None) -> int:
        self.sources.append(sources)
        self.keys.append(key)
        self.work.append(work)
        return len(self.keys) - 1


def wire(
    chains: Sequence[Sequence[ChainNode]],
    positions: Sequence[Sequence[int]],
    waits: Sequence[tuple[Point, Point]],
) -> tuple[WiredNode, ...]:
    """Join chains into one graph.

    Everything after the second point of a wait follows everything before the first, as if an event
    were recorded there and waited for here. Nodes come in launch order, which decides how a GPU
    spreads a graph over its queues. O((nodes + waits) x (chains + nodes / 64)).

    Args:
        chains: The nodes of each run, predecessors first.
        positions: The launch position of each segment, by chain.
        waits: Pairs of points (recorded, waiting).

    Raises:
        PlanError: A chain lacks a mark, or waits go in a circle.
    """
    vertices = _Vertices()
    before: list[list[int]] = []  # by chain and boundary: what an event recorded there follows
    behind: list[list[int]] = []  # and what waits there precede
    for chain, (nodes, launches) in enumerate(zip(chains, positions, strict=True)):
        ends = _add_chain(vertices, chain, nodes, launches)
        before.append(ends[0])
        behind.append(ends[1])
    for recorded, waiting in waits:
        source = before[recorded.chain][recorded.boundary]
        vertices.sources[behind[waiting.chain][waiting.boundary]].append(source)
    return _resolved(vertices)


def _add_chain(
    vertices: _Vertices, chain: int, nodes: Sequence[ChainNode], launches: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Add a chain; returns both sides of its boundaries."""
    count = len(launches)
    found = sorted(node.mark for node in nodes if node.mark is not None)
    if found != list(range(1, count)):
        raise PlanError(f"A run of {count} segments was captured with marks {found}.")
    before, behind = [], []
    for boundary in range(count + 1):
        before.append(vertices.add((launches[max(boundary - 1, 0)], chain, -2), []))
        launch = launches[min(boundary, count - 1)]
        behind.append(vertices.add((launch, chain, -1), [before[boundary]]))
    vertex: list[int] = []  # what successors of each node follow
    interval: list[int] = []
    is_read = [False] * len(nodes)
    for index, node in enumerate(nodes):
        for earlier in node.predecessors:
            is_read[earlier] = True
        sources = [vertex[earlier] for earlier in node.predecessors] or [behind[0]]
        if node.mark is not None:
            vertices.sources[before[node.mark]] += sources
            vertex.append(behind[node.mark])
            interval.append(node.mark)
            continue
        interval.append(max((interval[earlier] for earlier in node.predecessors), default=0))
        key = (launches[interval[-1]], chain, index)
        vertex.append(vertices.add(key, sources, (chain, index) if node.is_work else None))
    last = [vertex[i] for i in range(len(nodes)) if not is_read[i]]
    vertices.sources[before[count]] += last or [behind[0]]
    return before, behind


def _resolved(vertices: _Vertices) -> tuple[WiredNode, ...]:
    """The work in launch order, each after the nearest work that it follows.

    What is waited for already by what is waited for is left out: a GPU counts every edge.
    """
    readers: list[list[int]] = [[] for _ in vertices.keys]
    missing = [len(sources) for sources in vertices.sources]
    for vertex, sources in enumerate(vertices.sources):
        for source in sources:
            readers[source].append(vertex)
    ready = [(vertices.keys[v], v) for v, count in enumerate(missing) if not count]
    heapify(ready)
    nearest: list[set[int]] = [set() for _ in vertices.keys]
    wired: list[WiredNode] = []
    reached: list[int] = []
    """A bit for each node that one comes after, however far behind."""
    popped = 0
    while ready:
        _, vertex = heappop(ready)
        popped += 1
        follows = nearest[vertex]
        if (work := vertices.work[vertex]) is not None:
            kept, before = _unimplied(follows, reached)
            wired.append(WiredNode(*work, kept))
            reached.append(before)
            follows = {len(wired) - 1}
        for reader in readers[vertex]:
            nearest[reader] |= follows
            missing[reader] -= 1
            if not missing[reader]:
                heappush(ready, (vertices.keys[reader], reader))
    if popped < len(vertices.keys):
        raise PlanError("The waits between streams go in a circle.")
    return tuple(wired)


def _unimplied(follows: set[int], reached: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Those that no other of them comes after, and bits of all that are before."""
    kept: list[int] = []
    before = 0
    for node in sorted(follows, reverse=True):  # what comes after a node has a higher number
        if not before >> node & 1:
            kept.append(node)
            before |= reached[node] | 1 << node
    return tuple(reversed(kept)), before
