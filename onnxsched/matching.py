"""Maximum matching of sources with sinks that paths lead to."""

from __future__ import annotations

from collections.abc import Sequence

Links = Sequence[Sequence[int]]
"""For each vertex of a directed acyclic graph its successors."""


def maximum_matching(links: Links, sources: Sequence[int], sinks: Sequence[int]) -> dict[int, int]:
    """Match as many sources as possible, each with another sink that a path leads to.

    This is bipartite matching (Hopcroft and Karp, 1973) between the sources and sinks, which may
    be the same vertices, in the transitive closure, but the closure is never made: paths are
    followed in the graph itself, where any number may run through a vertex. A phase finds
    shortest augmenting paths breadth first, then takes a maximal disjoint set of them depth
    first. There are O(sqrt(n)) phases. One visits a vertex once, an edge twice, and walks every
    path that it takes: O(n + edges) where a source's sink is near.

    Args:
        links: The graph.
        sources: In the order in which they are served.
        sinks: Those that may be matched.

    Returns:
        The sink of each matched source.
    """
    is_sink = bytearray(len(links))
    for sink in sinks:
        is_sink[sink] = 1
    sink_of: dict[int, int] = {}
    source_of: dict[int, int] = {}
    while layers := _layers(links, sources, is_sink, sink_of, source_of):
        is_open = bytearray(is_sink)
        position = [0] * len(layers)
        for source in sources:
            if source in sink_of:
                continue
            if path := _path(source, links, layers, is_open, position, source_of):
                _flip(path, len(links), sink_of, source_of)
    return sink_of


def _layers(
    links: Links,
    sources: Sequence[int],
    is_sink: bytearray,
    sink_of: dict[int, int],
    source_of: dict[int, int],
) -> list[int]:
    """How many matched pairs are between the unmatched sources and each vertex, -1 if more.

    A vertex v has two entries, as a way to sinks at v and as a source at n + v. Layers after the
    first with an unmatched sink are left out. Empty when the matching is maximum.
    """
    size = len(links)
    layers = [-1] * (2 * size)
    frontier = [source for source in sources if source not in sink_of]
    depth = 0
    while frontier:
        is_last = False
        for source in frontier:
            layers[size + source] = depth
        pending, frontier = frontier, []
        while pending:
            for vertex in links[pending.pop()]:
                if layers[vertex] >= 0:
                    continue
                layers[vertex] = depth
                pending.append(vertex)
                if is_sink[vertex]:
                    if vertex in source_of:
                        frontier.append(source_of[vertex])
                    else:
                        is_last = True
        if is_last:
            return layers
        depth += 1
    return []


def _path(
    root: int,
    links: Links,
    layers: list[int],
    is_open: bytearray,
    position: list[int],
    source_of: dict[int, int],
) -> list[int]:
    """An augmenting path from `root`, in the numbering of `layers`; empty if there is none.

    Sinks that were tried are closed. An entry whose successors lead to no open sink loses its
    layer; `position` is that of the first successor not yet known to.
    """
    size = len(links)
    path = [size + root]
    while path:
        entry = path[-1]
        if entry < size and is_open[entry]:
            is_open[entry] = 0
            if entry not in source_of:
                return path
            if layers[size + source_of[entry]] == layers[entry] + 1:
                path.append(size + source_of[entry])
                continue
        successors = links[entry % size]
        while position[entry] < len(successors):
            if layers[successors[position[entry]]] == layers[entry]:
                path.append(successors[position[entry]])
                break
            position[entry] += 1
        else:
            layers[entry] = -1
            path.pop()
    return []


def _flip(path: list[int], size: int, sink_of: dict[int, int], source_of: dict[int, int]) -> None:
    """Match each source on an augmenting path with the sink that ends its part of the path."""
    parts = [index for index, entry in enumerate(path) if entry >= size]
    for first, end in zip(parts, [*parts[1:], len(path)], strict=True):
        source, sink = path[first] - size, path[end - 1]
        sink_of[source], source_of[sink] = sink, source
