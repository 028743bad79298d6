"""Pools: what a window may see."""

from __future__ import annotations

import onnx


def may_see_padding_alone(pool: onnx.NodeProto) -> bool:
    """Whether a window of a pool may lie in padding: a MaxPool's result is the lowest number then.

    ONNX Runtime wants less padding than a window is wide; so only one with gaps can.
    """
    numbers = {attribute.name: list(attribute.ints) for attribute in pool.attribute}
    has_gaps = any(dilation > 1 for dilation in numbers.get("dilations", []))
    return has_gaps and any(numbers.get("pads", []))
