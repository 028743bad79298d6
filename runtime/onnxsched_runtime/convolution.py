"""Convolutions with what can be done in the same kernel: what they are, not how they run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Kernel = tuple[tuple[int, ...], ...]
"""A kernel of cuDNN's: the number of its engine, then pairs of a knob's type and value."""


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
class FusedNode:
    """A node of the domain `FUSED_DOMAIN`: a convolution and the tensors that it uses."""

    what: FusedConvolution
    image: str
    filters: str
    """A weight, as ONNX stores it."""
    bias: str | None
    """A weight."""
    added: str | None
    output: str


Kernels = Mapping[FusedConvolution, Kernel]
"""Which kernel is the fastest, for those that it was measured of."""


def kernels_to_json(kernels: Kernels) -> list[Any]:
    """A JSON array."""
    names = FusedConvolution.__slots__
    return [[[getattr(what, n) for n in names], kernel] for what, kernel in kernels.items()]


def kernels_from_json(content: Sequence[Any]) -> dict[FusedConvolution, Kernel]:
    """Read what `kernels_to_json` wrote.

    Raises:
        TypeError, ValueError: It is something else.
    """
    return {FusedConvolution(*map(_frozen, fields)): _kernel(kernel) for fields, kernel in content}


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
