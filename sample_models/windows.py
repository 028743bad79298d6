"""How the windows of convolutions and pooling move over an image."""

from collections.abc import Sequence
from math import ceil, floor
from typing import NamedTuple

Pads = tuple[int, int, int, int]
"""Zeros around an image: top, left, bottom, right."""


class ConvSpec(NamedTuple):
    """One row of an architecture's table.

    Attributes:
        channels: Number of output channels.
        kernel: Height and width of the window; one number for a square.
        stride: Step of the window, the same both ways.
        pad: Zeros around the image: None keeps the size (at stride 1), a number is for all
            four sides.
    """

    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    pad: int | Pads | None = None

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the window."""
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    @property
    def pads(self) -> Pads:
        """Zeros around the image."""
        if self.pad is None:
            height, width = (side // 2 for side in self.window)
            return height, width, height, width
        return (self.pad,) * 4 if isinstance(self.pad, int) else self.pad


def positions(
    image: Sequence[int],
    window: tuple[int, int],
    stride: int,
    pads: Pads,
    round_up: bool = False,
) -> tuple[int, ...]:
    """Counts the positions of a window on an image.

    Args:
        image: Height and width of the image.
        window: Height and width of the window.
        stride: Step of the window.
        pads: Zeros around the image.
        round_up: Whether the last window may hang over the edge.

    Returns:
        Height and width of the result; less than one where the window does not fit.
    """
    rounded = ceil if round_up else floor
    return tuple(
        rounded((size + before + after - side) / stride) + 1
        for size, side, before, after in zip(image, window, pads[:2], pads[2:], strict=True)
    )
