"""Biases that attention does not need: those of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnxsched.simplification.products import is_product
from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute
from onnxsched_runtime.model import is_standard, renamed
from onnxsched_runtime.views import VIEWS, permutation

_Origins = npt.NDArray[np.int32]
"""For each element of a tensor, which element of the bias was added to it."""


@dataclass(frozen=True)
class _MultipliedBias:
    """A stored bias in the right side of a product."""

    bias: npt.NDArray[np.floating[Any]]
    old: tuple[onnx.NodeProto, onnx.NodeProto]
    """What adds it, and what reads the sum, be it a view."""
    without: onnx.NodeProto
    """The second of those, but without the bias."""
    product: onnx.NodeProto
    """What multiplies by it, through views and Transposes."""
    origins: _Origins
    """Of the product's right side, [..., inner, columns]."""


def key_bias(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """The bias of the keys goes: it adds to all scores of a query the same, which Softmax ignores.

    For a query q and keys k + b, the score of each key is q k + q b.
    """
    found = _multiplied_bias(index, node)
    if found is None or not _is_same_along(found.origins, -1):
        return None
    if not _reaches_softmax(index, found.product.output[0]):
        return None
    return Replacement(found.old, (found.without,))


def value_bias(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """The bias of the values moves into that of attention's output.

    What Softmax writes sums to 1, so the bias passes through to the output's product, by whose
    weight it is multiplied once and for all.
    """
    found = _multiplied_bias(index, node)
    if found is None or not _is_same_along(found.origins, -2):
        return None
    shape = index.shape(found.product.output[0])
    if not shape or 0 in shape or not _is_weighted_by_softmax(index, found.product):
        return None
    if len(index.shape(found.product.input[0]) or ()) < 2:  # a vector, and no row of what results
        return None
    mixed = np.broadcast_to(found.origins[..., :1, :], shape)
    output, tensor, mixed = _through_views(index, found.product.output[0], mixed)
    if output is None or not is_standard(output, "MatMul") or output.input[0] != tensor:
        return None
    reader = index.sole_reader(output.output[0])
    old = None if reader is None else _added_bias(index, reader, output.output[0])
    weight = index.weights.get(output.input[1])
    rows = mixed.reshape(-1, mixed.shape[-1])
    if reader is None or old is None or weight is None or len(weight.dims) != 2:
        return None
    if (rows != rows[0]).any():
        return None
    bias = numpy_helper.to_array(index.weights[old])
    moved = found.bias[rows[0]].astype(np.float64) @ numpy_helper.to_array(weight)
    name = index.unused(f"{output.output[0]}/bias")
    merged = numpy_helper.from_array((bias + moved).astype(bias.dtype), name)
    changed = renamed(reader, {old: name})
    return Replacement((*found.old, reader), (found.without, changed), (merged,))


def _multiplied_bias(index: GraphIndex, node: onnx.NodeProto) -> _MultipliedBias | None:
    """A stored bias added to what, through views and Transposes, is a product's right side."""
    result = node.output[0] if is_standard(node, "Add") else ""
    shape, first = index.shape(result), index.sole_reader(result)
    if not shape or 0 in shape or first is None:
        return None
    left, right = node.input
    bias, before = (left, right) if left in index.weights else (right, left)
    weight = index.weights.get(bias)
    if weight is None or tuple(weight.dims) != shape[-1:] or index.shape(before) != shape:
        return None
    origins = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    product, tensor, origins = _through_views(index, result, origins)
    if product is None or not is_product(product) or tensor == product.input[0]:
        return None
    if attribute(product, "transB", 0):
        origins = origins.swapaxes(-1, -2)
    array = numpy_helper.to_array(weight)
    without = renamed(first, {result: before})
    return _MultipliedBias(array, (node, first), without, product, origins)


def _through_views(
    index: GraphIndex, tensor: str, origins: _Origins
) -> tuple[onnx.NodeProto | None, str, _Origins]:
    """Follow a tensor to what reads it through views and Transposes; None if there are several."""
    while (reader := index.sole_reader(tensor)) is not None:
        result = reader.output[0]
        shape = index.shape(result)
        if is_standard(reader, "Transpose"):
            origins = origins.transpose(permutation(reader, origins.ndim))
        elif is_standard(reader, *VIEWS) and shape is not None:
            origins = origins.reshape(shape)
        else:
            break
        tensor = result
    return reader, tensor, origins


def _is_same_along(origins: _Origins, axis: int) -> bool:
    return origins.ndim > 1 and bool((origins == origins.take([0], axis)).all())


def _reaches_softmax(index: GraphIndex, tensor: str) -> bool:
    """Whether all that is done with scores is a Softmax of each row, after sums and scaling."""
    while (reader := index.sole_reader(tensor)) is not None:
        before, after = index.shape(tensor), index.shape(reader.output[0])
        if before is None or after is None or before[-1:] != after[-1:]:
            return False
        if is_standard(reader, "Softmax"):
            return attribute(reader, "axis", None) in (-1, len(before) - 1)
        if not is_standard(reader, "Add", *VIEWS):
            return False
        tensor = reader.output[0]
    return False


def _is_weighted_by_softmax(index: GraphIndex, product: onnx.NodeProto) -> bool:
    """Whether a product's left side is what a Softmax of each row writes, unscaled."""
    tensor = product.input[0]
    flags = (attribute(product, name, 0) for name in ("transA", "transBatchA"))
    if any(flags) or attribute(product, "alpha", 1.0) != 1:
        return False
    while view := index.writer(tensor, *VIEWS):
        before, after = index.shape(view.input[0]), index.shape(tensor)
        if before is None or after is None or before[-1:] != after[-1:]:
            return False
        tensor = view.input[0]
    shape, softmax = index.shape(tensor), index.writer(tensor, "Softmax")
    if shape is None or softmax is None:
        return False
    return attribute(softmax, "axis", None) in (-1, len(shape) - 1)


def _added_bias(index: GraphIndex, reader: onnx.NodeProto, tensor: str) -> str | None:
    """The stored bias that the reader of a product adds to it."""
    bias = ""
    if reader.op_type == "SkipLayerNormalization" and list(reader.input[:2]).count(tensor) == 1:
        bias = reader.input[4] if len(reader.input) > 4 else ""
    elif is_standard(reader, "Add"):
        bias = reader.input[1 if reader.input[0] == tensor else 0]
    weight, shape = index.weights.get(bias), index.shape(tensor)
    if weight is None or shape is None or tuple(weight.dims) != shape[-1:]:
        return None
    return bias
