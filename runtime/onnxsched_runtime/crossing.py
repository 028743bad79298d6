"""Tensors that cross between devices: each once for every device that reads it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.naming import new_name
from onnxsched_runtime.plan import Operation, name_on


def with_copies(
    operations: Sequence[Operation],
) -> tuple[tuple[Operation, ...], dict[str, str]]:
    """Let every captured operation read from its own device.

    A tensor lives where it is written; one that comes from the caller or the host, where it is
    first read. A copy is an operation on a stream of its own, launched right after what writes the
    tensor, so that it waits for nothing else and nothing else waits for it. O(operations + reads).

    Args:
        operations: In launch order; none is a copy.

    Returns:
        The operations with copies among them, and for each copied tensor the tensor it copies.
    """
    homes = homes_of(operations)
    streams: dict[Device, int] = {}
    taken: set[str] = set()
    for operation in operations:
        taken.update((operation.name, *operation.reads, *operation.writes))
        device, stream = operation.placement.device, operation.placement.stream
        streams[device] = max(streams.get(device, 0), stream + 1)
    copies: dict[tuple[str, Device], Operation] = {}
    moved = []
    for operation in operations:
        device = operation.placement.device
        if operation.host_reason is None:
            strange = [t for t in operation.reads if homes[t] != device]
            for tensor in strange:
                if (tensor, device) not in copies:
                    placement = Placement(device, streams[device])
                    streams[device] += 1
                    copies[tensor, device] = _copy_of(tensor, placement, taken)
            names = {tensor: copies[tensor, device].name for tensor in strange}
            operation = replace(
                operation, reads=tuple(names.get(tensor, tensor) for tensor in operation.reads)
            )
        moved.append(operation)
    return _launched(moved, copies.values()), {c.name: c.reads[0] for c in copies.values()}


def _copy_of(tensor: str, placement: Placement, taken: set[str]) -> Operation:
    """The operation that copies a tensor to the device of a placement."""
    name = new_name(name_on(tensor, placement.device), taken)
    return Operation(name, placement, (tensor,), (name,))


def homes_of(operations: Iterable[Operation]) -> Mapping[str, Device]:
    """The device that each tensor lives on, for those that a captured operation reads."""
    homes: dict[str, Device] = {}
    for operation in operations:
        if operation.host_reason is None:
            homes |= dict.fromkeys(operation.writes, operation.placement.device)
    for operation in operations:
        if operation.host_reason is None:
            for tensor in operation.reads:
                homes.setdefault(tensor, operation.placement.device)
    return homes


def _launched(
    operations: Sequence[Operation], copies: Iterable[Operation]
) -> tuple[Operation, ...]:
    """The operations, each followed by the copies of what it writes, those of inputs first."""
    waiting: dict[str, list[Operation]] = {}
    for copy in copies:
        waiting.setdefault(copy.reads[0], []).append(copy)
    written = {tensor for operation in operations for tensor in operation.writes}
    ordered = [copy for tensor, some in waiting.items() if tensor not in written for copy in some]
    for operation in operations:
        ordered.append(operation)
        for tensor in operation.writes:
            ordered += waiting.get(tensor, [])
    return tuple(ordered)
