"""Putting things in order, each after what it depends on. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush
from typing import Any


def topological(keys: Sequence[Any], sources: Sequence[Collection[int]]) -> list[int]:
    """All indices by key, but none before those that it depends on. O(n log n + edges).

    Args:
        keys: What decides among those that are ready: the least comes first.
        sources: For each index the distinct indices that it depends on, in no circle.
    """
    dependents: list[list[int]] = [[] for _ in keys]
    for index, those in enumerate(sources):
        for source in those:
            dependents[source].append(index)
    missing = [len(those) for those in sources]
    ready = [(keys[index], index) for index, count in enumerate(missing) if not count]
    heapify(ready)
    order = []
    while ready:
        _, index = heappop(ready)
        order.append(index)
        for dependent in dependents[index]:
            missing[dependent] -= 1
            if not missing[dependent]:
                heappush(ready, (keys[dependent], dependent))
    return order
