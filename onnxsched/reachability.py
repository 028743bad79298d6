"""Which operators come after which: sets of operators as the bits of Python integers.

All pairs of a large graph take gigabytes, so questions are asked about a block of targets at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxsched.graph import OperatorGraph

_BLOCK_SIZE = 8192
"""Targets in a block: long enough that operations on whole sets outweigh Python's own work."""


def levels(graph: OperatorGraph) -> tuple[int, ...]:
    """The edges on the longest path from a source to each operator. O(n + edges).

    No path joins operators of one level.
    """
    level_of: list[int] = []
    for predecessors in graph.predecessors:
        level_of.append(max((level_of[p] + 1 for p in predecessors), default=0))
    return tuple(level_of)


def blocks(targets: Sequence[int]) -> Iterator[Sequence[int]]:
    """The targets, in their order, as many at a time as `reached_targets` is good for."""
    for first in range(0, len(targets), _BLOCK_SIZE):
        yield targets[first : first + _BLOCK_SIZE]


def reached_targets(
    graph: OperatorGraph, targets: Sequence[int], first_operator: int = 0
) -> list[int]:
    """For each operator the set of targets it is or reaches.

    Bit k of entry v is set where v is the k-th target or a path leads from v to it. Operators
    before `first_operator` are not looked at: what they reach is left out.
    O(edges * targets / word size), and n * targets / 8 bytes.
    """
    reached = [0] * len(graph)
    for bit, target in enumerate(targets):
        reached[target] = 1 << bit
    for operator in range(max(targets, default=-1), first_operator - 1, -1):
        found = reached[operator]
        for successor in graph.successors[operator]:
            found |= reached[successor]
        reached[operator] = found
    return reached


def transitive_reduction(graph: OperatorGraph) -> tuple[tuple[int, ...], ...]:
    """For each operator its successors, ascending, that it reaches by no longer path.

    An edge (u, w) can only be left out where w is two levels or more below u, and u has another
    successor above w. Only such edges are looked at, those into one block of targets together,
    and only operators between them: O(n + edges) where edges are short or join neighbouring
    levels, else O(edges * n / word size).
    """
    level_of = levels(graph)
    suspects: dict[int, list[int]] = {}
    for operator, successors in enumerate(graph.successors):
        highest = min((level_of[s] for s in successors), default=0)
        for successor in successors:
            if level_of[successor] > max(level_of[operator] + 1, highest):
                suspects.setdefault(successor, []).append(operator)
    reduction = [set(successors) for successors in graph.successors]
    for block in blocks(sorted(suspects)):
        first = min(suspects[target][0] for target in block)
        reached = reached_targets(graph, block, first)
        for bit, target in enumerate(block):
            for operator in suspects[target]:
                # `target` itself is one of the successors that reach it.
                if sum(reached[s] >> bit & 1 for s in graph.successors[operator]) > 1:
                    reduction[operator].discard(target)
    return tuple(tuple(sorted(successors)) for successors in reduction)
