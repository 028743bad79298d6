"""What waits for the link between two devices, since that carries one tensor after another."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched_runtime.device import Device

Busy = tuple[tuple[float, ...], ...]
"""Microseconds by source and target, both by their number among the devices."""
Outputs = tuple[tuple[Busy, tuple[int, ...]], ...]
"""For each tensor that an operator writes, for how long it keeps a link, and who reads it."""
Send = tuple[int, float, tuple[int, ...]]
"""The number of a link, for how many microseconds a tensor keeps it, and who reads that there."""


def outputs_of(
    graph: OperatorGraph, cost: CostModel, devices: Sequence[Device]
) -> tuple[Outputs, ...]:
    """The tensors that each operator writes. O(edges + different sizes * devices^2).

    A transfer keeps its link for `cost.contention.link_share` of what it takes beyond a transfer
    of nothing. Without that share, or other devices, there are no tensors to wait for.
    """
    share = cost.contention.link_share
    if not share or len(devices) < 2:
        return ((),) * len(graph)
    busy = {
        nbytes: tuple(
            tuple(
                share * (cost.transfer_us(nbytes, source, target) - latency_us)
                for target in devices
                for latency_us in [cost.transfer_us(0, source, target)]
            )
            for source in devices
        )
        for nbytes in {edge.nbytes for edge in graph.edges}
    }
    found: list[Outputs] = []
    for edges in graph.outgoing:
        readers: dict[str, list[int]] = {}
        for edge in edges:
            readers.setdefault(edge.tensor, []).append(edge.consumer)
        nbytes_of = {edge.tensor: edge.nbytes for edge in edges}
        found.append(tuple((busy[nbytes_of[t]], tuple(who)) for t, who in readers.items()))
    return tuple(found)


def sends_between(
    outputs: Sequence[Outputs], devices: Sequence[int], device_count: int
) -> list[list[Send]]:
    """What each operator sends to other devices, given the number of each one's device. O(edges).

    A tensor crosses once to each device, whoever reads it there.
    """
    sends: list[list[Send]] = []
    for source, tensors in zip(devices, outputs, strict=True):
        own: list[Send] = []
        for busy, readers in tensors:
            for target in dict.fromkeys(devices[reader] for reader in readers):
                if target != source:
                    there = tuple(reader for reader in readers if devices[reader] == target)
                    own.append((source * device_count + target, busy[source][target], there))
        sends.append(own)
    return sends
