"""What is launched without a session, and the kernels of cuDNN that compute it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_POOL = "pool"
"""What JSON marks a pool with."""

Kernel = tuple[tuple[int, ...], ...]
"""A kernel of cuDNN's: the number of its engine, then pairs of a knob's type and value."""
PLAIN: Kernel = ((-1,),)
"""What cuDNN chooses by itself, which for pools only its old interface, without engines, does."""


@dataclass(frozen=True, slots=True)
class FusedConvolution:
    """What is convolved, and what is done with the result before it is written.

    Images lie in memory with their channels last. Shapes are in ONNX's order all the same:
    (images, channels, height, width).
    """

    element_type: int
    """ONNX element type of all tensors."""
    image: tuple[int, ...]
    filters: tuple[int, ...]
    """(channels out, channels in of a group, height, width)."""
    output: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    """Before each spatial dimension, then behind each."""
    has_bias: bool
    adds: bool
    """Whether a tensor like the output is added."""
    is_rectified: bool
    """Whether negative results become 0."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What is pooled, and how; images as in `FusedConvolution`."""

    element_type: int
    """ONNX element type of both tensors."""
    image: tuple[int, ...]
    output: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    """Before each spatial dimension, then behind each."""
    averages: bool
    """Whether the result is the average of a window, else its maximum."""
    counts_padding: bool
    """Whether an average is over all of a window, padding with zeros included."""


Computed = FusedConvolution | Pool
"""What a kernel computes."""


@dataclass(frozen=True, slots=True)
class FusedNode:
    """A node of the domain `FUSED_DOMAIN`: what it computes and the tensors that it uses."""

    what: Computed
    image: str
    filters: str | None
    """A weight, as ONNX stores it; None for pools."""
    bias: str | None
    """A weight."""
    added: str | None
    output: str


Kernels = Mapping[Computed, Kernel]
"""Which kernel is the fastest, for what it was measured of."""


def kernels_to_json(kernels: Kernels) -> list[Any]:
    """A JSON array."""
    return [[_to_json(what), kernel] for what, kernel in kernels.items()]


def _to_json(what: Computed) -> list[Any]:
    values = [getattr(what, name) for name in what.__slots__]
    return [_POOL, *values] if isinstance(what, Pool) else values


def kernels_from_json(content: Sequence[Any]) -> dict[Computed, Kernel]:
    """Read what `kernels_to_json` wrote.

    Raises:
        TypeError, ValueError: It is something else.
    """
    return {_from_json(fields): _kernel(kernel) for fields, kernel in content}


def _from_json(fields: Sequence[Any]) -> Computed:
    if isinstance(fields, list) and fields[:1] == [_POOL]:
        return Pool(*map(_frozen, fields[1:]))
    return FusedConvolution(*map(_frozen, fields))


def _kernel(content: Sequence[Any]) -> Kernel:
    (engine,), *knobs = _frozen(content)
    pairs = [(knob, value) for knob, value in knobs]
    numbers = [engine, *(number for pair in pairs for number in pair)]
    if any(not isinstance(n, int) or not -(2**63) <= n < 2**63 for n in numbers):
        raise ValueError(f"{content!r} is no kernel")
    return ((engine,), *pairs)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no number")
    return value
