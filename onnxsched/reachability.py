"""Which operators come after which: sets of operators as the bits of Python integers."""

from __future__ import annotations

from onnxsched.graph import OperatorGraph


def descendants(graph: OperatorGraph) -> tuple[int, ...]:
    """For each operator the set of those it reaches, itself not included.

    Bit w of entry v is set when there is a path from v to w. O(edges * n / word size).
    """
    reach = [0] * len(graph)
    for operator in reversed(range(len(graph))):
        for successor in graph.successors[operator]:
            reach[operator] |= reach[successor] | 1 << successor
    return tuple(reach)


def transitive_reduction(graph: OperatorGraph, reach: tuple[int, ...]) -> tuple[int, ...]:
    """For each operator the set of successors that it reaches by no longer path.

    `reach` is `descendants(graph)`. O(edges * n / word size).
    """
    reduction: list[int] = []
    for successors in graph.successors:
        direct = indirect = 0
        for successor in successors:
            direct |= 1 << successor
            indirect |= reach[successor]
        reduction.append(direct & ~indirect)
    return tuple(reduction)
