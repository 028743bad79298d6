"""Fewer operators that compute the same, beyond what ONNX Runtime merges itself.

In a CUDA graph every kernel costs about two microseconds, which for the small operators of a
transformer is most of their time. What is here pays on every GPU, so it is always done.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxsched.simplification.attention import key_bias, value_bias
from onnxsched.simplification.concats import concat_of_concat, scale_before_concat
from onnxsched.simplification.norms import rms_norm, scaled_norm, skip_norm
from onnxsched.simplification.pads import (
    convolution_of_every_other,
    pad_before_average,
    pad_before_maximum,
)
from onnxsched.simplification.pools import average_after_convolution
from onnxsched.simplification.products import product_as_columns, product_of_transposed
from onnxsched.simplification.relus import rectify_after_concat, rectify_after_pool
from onnxsched.simplification.replacing import declare, remove_unused, replace_all
from onnxsched.simplification.views import idle_view, transpose_as_view, view_of_view
from onnxsched_runtime.tensor import TensorType

_RULES = (
    rectify_after_pool,
    concat_of_concat,
    pad_before_average,
    pad_before_maximum,
    convolution_of_every_other,
    scale_before_concat,
    average_after_convolution,
    transpose_as_view,
    rms_norm,
    skip_norm,
    scaled_norm,
    key_bias,
    value_bias,
    product_of_transposed,
    product_as_columns,
    view_of_view,
    idle_view,
)


def simplify(model: onnx.ModelProto, tensors: Mapping[str, TensorType]) -> None:
    """Make fewer and cheaper operators of what ONNX Runtime left, in place.

    Nodes keep their names; those of fused operators keep the name of the last one. New tensors
    are declared. What depends on a tensor without a static shape stays as it is.

    Args:
        model: Optimized by ONNX Runtime, its nodes uniquely named and in topological order.
        tensors: The types of its tensors, weights left out.
    """
    rectify_after_concat(model)
    known = dict(tensors)
    declare(model, known)
    for rule in _RULES:
        while replace_all(model, rule, known):
            pass
    remove_unused(model)
