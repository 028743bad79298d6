"""Concats that copy what they join only once."""

from __future__ import annotations

import onnx

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute, is_standard

_MOST_INPUTS = 32
"""ORT's CUDA kernel refuses a capture with more, and then ends the process."""


def concat_of_concat(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A Concat of what another has joined along the same axis joins all itself."""
    if not is_standard(node, "Concat"):
        return None
    for position, tensor in enumerate(node.input):
        inner = index.sole_writer(tensor, "Concat")
        if inner is None or attribute(inner, "axis", 0) != attribute(node, "axis", 0):
            continue
        joined = [*node.input[:position], *inner.input, *node.input[position + 1 :]]
        if tensor in joined or len(joined) > _MOST_INPUTS:
            continue
        flat = onnx.NodeProto()
        flat.CopyFrom(node)
        flat.input[:] = joined
        return Replacement((inner, node), (flat,))
    return None
