"""Operators that only change the shape: ONNX Runtime lets them alias what they read, for free."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from onnxsched_runtime.model import is_standard

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Those operators; Transpose is none, since ONNX Runtime copies for it."""


def is_view(node: onnx.NodeProto) -> bool:
    """Whether a node is one of them."""
    return is_standard(node, *VIEWS)


def permutation(transpose: onnx.NodeProto, rank: int) -> list[int]:
    """Which axis of what it reads each axis of a Transpose's result is."""
    given = [list(a.ints) for a in transpose.attribute if a.name == "perm"]
    return given[0] if given else list(reversed(range(rank)))


def is_idle(transpose: onnx.NodeProto, shape: Sequence[int]) -> bool:
    """Whether a Transpose of a tensor of this shape moves only dimensions of size 1."""
    moved = [axis for axis in permutation(transpose, len(shape)) if shape[axis] != 1]
    return moved == sorted(moved)
