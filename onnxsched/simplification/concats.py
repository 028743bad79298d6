"""Concats that copy what they join only once."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute
from onnxsched_runtime.model import is_standard

_MOST_INPUTS = 32
"""ORT's CUDA kernel refuses a capture with more, and then ends the process."""
_IMAGE_RANK = 4


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


def scale_before_concat(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A BatchNormalization of what a Concat has joined, in the weights of convolutions before it.

    ORT does so where there is no Concat between.
    """
    if not is_standard(node, "BatchNormalization") or attribute(node, "training_mode", 0):
        return None
    concat = index.sole_writer(node.input[0], "Concat")
    if concat is None or attribute(concat, "axis", 0) != 1 or len(node.output) != 1:
        return None
    if len(set(concat.input)) != len(concat.input):  # one convolution would be scaled in two ways
        return None
    convs = [index.sole_writer(tensor, "Conv") for tensor in concat.input]
    held = [index.weights.get(name) for name in node.input[1:]]
    if any(one is None or not _is_float(one) for one in held):
        return None
    scale, offset, mean, variance = (numpy_helper.to_array(one) for one in held if one is not None)
    factor = scale / np.sqrt(variance + np.float32(attribute(node, "epsilon", 1e-5)))
    shift = offset - mean * factor
    start, new, weights = 0, [], []
    for conv in convs:
        found = None if conv is None else _weights(index, conv)
        if conv is None or found is None:
            return None
        weight, bias = found
        part = slice(start, start + len(bias))
        start = part.stop
        scaled = onnx.NodeProto()
        scaled.CopyFrom(conv)
        names = [index.unused(f"{conv.output[0]}/{kind}") for kind in ("weight", "bias")]
        scaled.input[1:] = names
        values = weight * factor[part, None, None, None], bias * factor[part] + shift[part]
        weights += [numpy_helper.from_array(v, n) for v, n in zip(values, names, strict=True)]
        new.append(scaled)
    joined = onnx.NodeProto()
    joined.CopyFrom(concat)
    joined.output[0] = node.output[0]
    old = (*(conv for conv in convs if conv is not None), concat, node)
    return Replacement(old, (*new, joined), tuple(weights))


def _weights(index: GraphIndex, conv: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
    """The weight of a convolution of images and its bias, zeros where it has none."""
    held = [index.weights.get(name) for name in conv.input[1:] if name]
    if any(one is None or not _is_float(one) for one in held) or not held:
        return None
    weight, *bias = (numpy_helper.to_array(one) for one in held if one is not None)
    if weight.ndim != _IMAGE_RANK:
        return None
    return weight, bias[0] if bias else np.zeros(len(weight), np.float32)


def _is_float(weight: TensorProto) -> bool:
    return bool(weight.data_type == TensorProto.FLOAT)
