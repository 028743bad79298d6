"""How long each operator waits for each of its predecessors, for every pair of devices."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched_runtime.device import Device

Delays = tuple[tuple[float, ...], ...]
"""Microseconds by source and target, both by their number among the devices."""
Inputs = tuple[tuple[int, Delays], ...]
"""The distinct operators that one reads from, and how long the longest transfer takes."""


def delays_between(
    graph: OperatorGraph, cost: CostModel, devices: Sequence[Device]
) -> tuple[Inputs, ...]:
    """The inputs of each operator. O(edges + different sizes * devices^2).

    For those who ask about the same tensors again and again, with operators on other devices.
    """
    of_size = {
        nbytes: tuple(
            tuple(cost.transfer_us(nbytes, source, target) for target in devices)
            for source in devices
        )
        for nbytes in {edge.nbytes for edge in graph.edges}
    }
    found: list[Inputs] = []
    for edges in graph.incoming:
        inputs: dict[int, Delays] = {}
        for edge in edges:
            delays, known = of_size[edge.nbytes], inputs.get(edge.producer)
            inputs[edge.producer] = delays if known is None else _longer(known, delays)
        found.append(tuple(inputs.items()))
    return tuple(found)


def _longer(one: Delays, other: Delays) -> Delays:
    return tuple(tuple(map(max, *rows)) for rows in zip(one, other, strict=True))
