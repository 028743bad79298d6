"""Where ONNX Runtime takes a Pad into the pool that reads it, whose zeros count no longer then."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxsched_runtime.model import is_standard

_PASSING = ("Cast", "Slice")
"""What the fusion of a Pad looks through, and what may be gone by then."""


def is_behind_pad(node: onnx.NodeProto, writers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether ORT might fuse a Pad with a pool once its padding is written out.

    It does so at its default level, and then zeros around the image count no longer: whoever
    opens the result would get other numbers, or be refused.
    """
    before = writers.get(node.input[0])
    while before is not None and is_standard(before, *_PASSING):
        before = writers.get(before.input[0])
    return before is not None and is_standard(before, "Pad")
