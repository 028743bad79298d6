"""Maximum bipartite matching over sets kept as the bits of Python integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def maximum_matching(adjacency: Sequence[int]) -> dict[int, int]:
    """Match as many left vertices with right vertices as possible (Hopcroft and Karp, 1973).

    Each phase finds shortest augmenting paths breadth first, then takes a maximal disjoint set of
    them depth first. A phase visits a right vertex once, and looks for the next one with a few
    operations on whole sets, so it takes O(n^2 / word size) however many edges there are; there
    are O(sqrt(n)) phases.

    Args:
        adjacency: for each left vertex the set of right vertices it may be matched with.

    Returns:
        The right vertex of each matched left vertex.
    """
    right_of: dict[int, int] = {}
    left_of: dict[int, int] = {}
    while layers := _layers(adjacency, right_of, left_of):
        for left in range(len(adjacency)):
            if left not in right_of:
                _augment(left, adjacency, layers, right_of, left_of)
    return right_of


def _layers(
    adjacency: Sequence[int], right_of: dict[int, int], left_of: dict[int, int]
) -> list[int]:
    """Right vertices by distance from the unmatched left ones, to the nearest unmatched ones.

    The last layer holds unmatched vertices only. Empty when the matching is maximum.
    """
    matched = 0
    for right in left_of:
        matched |= 1 << right
    layers: list[int] = []
    seen = 0
    frontier = [left for left in range(len(adjacency)) if left not in right_of]
    while frontier:
        found = 0
        for left in frontier:
            found |= adjacency[left]
        found &= ~seen
        if found & ~matched:
            return [*layers, found & ~matched]
        seen |= found
        layers.append(found)
        frontier = [left_of[right] for right in _bits(found)]
    return []


def _augment(
    root: int,
    adjacency: Sequence[int],
    layers: list[int],
    right_of: dict[int, int],
    left_of: dict[int, int],
) -> None:
    """Flip one augmenting path from `root` if there is one; visited vertices leave `layers`."""
    lefts = [root]
    rights: list[int] = []
    while lefts:
        depth = len(lefts) - 1
        candidates = adjacency[lefts[-1]] & layers[depth]
        if not candidates:
            lefts.pop()
            if rights:
                rights.pop()
            continue
        right = (candidates & -candidates).bit_length() - 1
        layers[depth] ^= 1 << right
        rights.append(right)
        if depth + 1 == len(layers):
            right_of.update(zip(lefts, rights, strict=True))
            left_of.update(zip(rights, lefts, strict=True))
            return
        lefts.append(left_of[right])


def _bits(members: int) -> Iterator[int]:
    """The members of a set, ascending."""
    while members:
        lowest = members & -members
        yield lowest.bit_length() - 1
        members ^= lowest
