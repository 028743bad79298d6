"""The steps of local search: small changes of a schedule that keep it valid. Pure."""

from __future__ import annotations

import random

from onnxsched.graph import OperatorGraph

Arrangement = tuple[list[int], list[int]]
"""The operators in launch order, and by operator the number of its stream."""


def neighbour(
    graph: OperatorGraph, arrangement: Arrangement, stream_count: int, rng: random.Random
) -> Arrangement:
    """An arrangement that differs a little, if at all; the one that is given stays as it is.

    An operator moves to another stream, two exchange theirs, two streams exchange their tails or
    one takes the other's, or an operator is launched earlier or later. O(operators).

    Args:
        graph: What is scheduled.
        arrangement: Where it starts from; no operator is launched before one that it reads.
        stream_count: How many streams there are, those not in use included.
        rng: Draws the step.
    """
    changed = (arrangement[0].copy(), arrangement[1].copy())
    rng.choice(_STEPS)(rng, graph, changed, stream_count)
    return changed


def _move(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> None:
    order, lanes = arrangement
    lanes[rng.choice(order)] = rng.randrange(stream_count)


def _swap(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> None:
    order, lanes = arrangement
    one, other = rng.choice(order), rng.choice(order)
    lanes[one], lanes[other] = lanes[other], lanes[one]


def _exchange_tails(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> None:
    """With an unused stream this splits one, and without the way back it merges two."""
    order, lanes = arrangement
    position = rng.randrange(len(order))
    one, other = lanes[order[position]], rng.randrange(stream_count)
    there_and_back = rng.random() < 0.7
    for operator in order[position:]:
        if lanes[operator] == one:
            lanes[operator] = other
        elif lanes[operator] == other and there_and_back:
            lanes[operator] = one


def _reorder(
    rng: random.Random, graph: OperatorGraph, arrangement: Arrangement, stream_count: int
) -> None:
    """Anywhere between what an operator reads from and what reads from it."""
    order, _ = arrangement
    position = rng.randrange(len(order))
    operator = order[position]
    before, after = set(graph.predecessors[operator]), set(graph.successors[operator])
    first = last = position
    while first > 0 and order[first - 1] not in before:
        first -= 1
    while last < len(order) - 1 and order[last + 1] not in after:
        last += 1
    order.insert(rng.randint(first, last), order.pop(position))


_STEPS = (_move, _move, _swap, _exchange_tails, _reorder)
