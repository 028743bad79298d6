"""Kernels that move numbers within a GPU's memory; torch has them for any order."""

from __future__ import annotations

from onnxsched_runtime.cuda.binding import torch_module
from onnxsched_runtime.cuda.operations import Launch
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.cuda.tensors import numbers_at
from onnxsched_runtime.device import Device
from onnxsched_runtime.moves import Cut, Reordered

_WIDTHS_NBYTES = (8, 4, 2, 1)


def cutting(move: Cut, source: int, target: int, device: Device) -> Launch:
    """What copies a piece out of a tensor, by the addresses of both.

    By a kernel that reads and writes: within a graph a copy without one takes longer to start.
    """
    begin = source + move.start_nbytes
    width = next(w for w in _WIDTHS_NBYTES if not (begin | target | move.nbytes) % w)
    torch = torch_module()
    read, written = (
        numbers_at(address, width, (move.nbytes // width,), (1,), device)
        for address in (begin, target)
    )

    def launch(stream: Stream) -> None:
        with stream.as_current():
            torch.bitwise_or(read, 0, out=written)

    return launch


def reordering(move: Reordered, source: int, target: int, device: Device) -> Launch:
    """What writes numbers in another order, by the addresses of both tensors."""
    shape, width = move.shape, move.item_nbytes
    dense = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        dense[axis] = dense[axis + 1] * shape[axis + 1]
    read = numbers_at(source + move.start * width, width, shape, move.strides, device)
    written = numbers_at(target, width, shape, dense, device)

    def launch(stream: Stream) -> None:
        with stream.as_current():
            written.copy_(read)

    return launch
