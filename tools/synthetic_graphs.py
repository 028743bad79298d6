"""Seeded graphs of any size: four families to measure how the scheduler grows, and HIOS's own."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from onnxsched.cost import Bound, Contention, OperatorCost, TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched.transfer import TransferCurve

Links = list[tuple[int, ...]]
"""For each operator the distinct operators it reads from, all before it."""

_BOUNDS: tuple[Bound, ...] = ("compute", "memory")
_NBYTES = tuple(2**power for power in range(8, 23))


def synthetic_problem(
    family: str, operator_count: int, seed: int = 0
) -> tuple[OperatorGraph, TableCost]:
    """A graph of a family of `FAMILIES` with random tensor sizes and costs.

    Durations are log-normal with a median of 8 us, as kernels of convolutional networks are many
    short ones and a few long ones; tensors have 256 bytes to 4 MiB. The same arguments give the
    same problem. O(operator_count).
    """
    rng = random.Random(f"{family}/{operator_count}/{seed}")
    links = FAMILIES[family](rng, operator_count)
    operators = tuple(Operator(f"{family}_{index}", "Op") for index in range(operator_count))
    edges = tuple(
        Edge(producer, consumer, f"t{producer}_{consumer}", rng.choice(_NBYTES))
        for consumer, producers in enumerate(links)
        for producer in producers
    )
    costs = tuple(
        OperatorCost(rng.lognormvariate(math.log(8.0), 1.0), rng.choice(_BOUNDS), rng.random())
        for _ in range(operator_count)
    )
    return OperatorGraph(operators, edges), TableCost(costs)


def hios_problem(
    operator_count: int, edge_count: int, layer_count: int, ratio: float, seed: int = 0
) -> tuple[OperatorGraph, TableCost]:
    """A graph as in the simulations of Kundu & Shu, "HIOS" (IEEE Cluster 2023).

    Operators lie on random layers; each reads from one of the layer before, and all other edges
    lead from any operator to any of a later layer. Durations are uniform between 0.1 and 4 ms, SM
    shares between 0.6 and 1, and two operators side by side slow each other down by their shares.
    A transfer takes `ratio` times as long as the operator that reads the tensor. The same
    arguments give the same problem.

    Args:
        operator_count: Operators, at least as many as layers.
        edge_count: Distinct edges; more where not every operator could read from another, fewer
            where there are not so many pairs.
        layer_count: Layers, none of them empty.
        ratio: Of communication to computation.
        seed: Of all that is random.
    """
    rng = random.Random(f"{operator_count}/{edge_count}/{layer_count}/{seed}")
    rest = rng.choices(range(layer_count), k=operator_count - layer_count)
    layer_of = sorted([*range(layer_count), *rest])
    starts = [bisect_left(layer_of, layer) for layer in range(layer_count)]
    pair_count = sum(starts[layer] for layer in layer_of)
    links = {
        (consumer, rng.randrange(starts[layer - 1], starts[layer]))
        for consumer, layer in enumerate(layer_of)
        if layer
    }
    while len(links) < min(edge_count, pair_count):
        consumer, producer = rng.randrange(operator_count), rng.randrange(operator_count)
        if layer_of[producer] < layer_of[consumer]:
            links.add((consumer, producer))
    costs = tuple(
        OperatorCost(rng.uniform(100.0, 4000.0), sm_share=rng.uniform(0.6, 1.0)) for _ in layer_of
    )
    edges = tuple(
        Edge(producer, consumer, f"t{producer}_{consumer}", nbytes)
        for consumer, producer in sorted(links)
        for nbytes in [round(1000 * ratio * costs[consumer].duration_us)]
    )
    operators = tuple(Operator(f"hios_{index}", "Op") for index in range(operator_count))
    curve = TransferCurve(((0, 0.0), (1000, 1.0)), is_peer=True)
    return OperatorGraph(operators, edges), TableCost(
        costs, contention=Contention(sm_slowdown=1.0), unmeasured=curve
    )


def layered(rng: random.Random, operator_count: int) -> Links:
    """As many layers as a layer has operators, each reading one to three of the layer before."""
    width = max(1, math.isqrt(operator_count))
    links: Links = []
    for operator in range(operator_count):
        first = (operator // width - 1) * width
        before = range(first, first + width) if first >= 0 else range(0)
        links.append(_some_of(rng, before))
    return links


def random_dag(rng: random.Random, operator_count: int) -> Links:
    """Each operator reads one to three of all before it: shallow, and as wide as graphs get."""
    return [_some_of(rng, range(operator)) for operator in range(operator_count)]


def nasnet_like(rng: random.Random, operator_count: int) -> Links:
    """Cells of five blocks that read the two cells before; the last one may be cut off."""
    return list(islice(_nasnet_operators(rng), operator_count))


def series_parallel(rng: random.Random, operator_count: int) -> Links:
    """Blocks within blocks: two in a row, or two to four between a fork and a join."""
    links: Links = [()] * operator_count

    def build(first: int, count: int) -> None:
        """Fill in a block that starts with operator `first` and ends with the last of `count`."""
        if count < 4 or rng.random() < 0.5:
            left = rng.randint(1, max(1, count - 1))
            if count > 1:
                build(first, left)
                build(first + left, count - left)
                links[first + left] = (first + left - 1,)
            return
        last = first + count - 1
        cuts = rng.sample(range(first + 2, last), min(rng.randint(1, 3), count - 3))
        starts = [first + 1, *sorted(cuts)]
        ends = [*(start - 1 for start in starts[1:]), last - 1]
        for start, end in zip(starts, ends, strict=True):
            build(start, end - start + 1)
            links[start] = (first,)
        links[last] = tuple(ends)

    if operator_count:
        build(0, operator_count)
    return links


FAMILIES: Mapping[str, Callable[[random.Random, int], Links]] = {
    "layered": layered,
    "series-parallel": series_parallel,
    "nasnet": nasnet_like,
    "random": random_dag,
}


def _nasnet_operators(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """What each operator reads, endlessly.

    NASNet-A's cell (Zoph et al., CVPR 2018): each block adds two branches, short chains that start
    from either input of the cell or an earlier block, and all blocks are concatenated.
    """
    yield ()
    yield (0,)
    outputs = [0, 1]
    next_index = 2
    while True:
        values = outputs[-2:]
        for _ in range(5):
            ends = []
            for source in rng.sample(values, 2):
                for _ in range(rng.randint(1, 4)):
                    yield (source,)
                    source, next_index = next_index, next_index + 1
                ends.append(source)
            yield tuple(ends)
            values = [*values, next_index]
            next_index += 1
        yield tuple(values[2:])
        outputs = [outputs[-1], next_index]
        next_index += 1


def _some_of(rng: random.Random, operators: range) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(operators, min(rng.randint(1, 3), len(operators)))))
