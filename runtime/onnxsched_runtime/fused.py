"""Nodes of our domain in a lowered model: what each computes, and on which tensors. Pure."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, numpy_helper

from onnxsched_runtime.kernels import FusedConvolution, FusedNode, Pool
from onnxsched_runtime.model import FUSED_DOMAIN, attributes_of
from onnxsched_runtime.source import ModelSource

_COMPUTED = ("Conv", "MaxPool", "AveragePool")


def fused_nodes(source: ModelSource) -> dict[str, FusedNode]:
    """The fused convolutions and pools of a model, by the names of their nodes."""
    return {
        node.name: fused_node(node, source)
        for node in source.model.graph.node
        if node.domain == FUSED_DOMAIN and node.op_type in _COMPUTED
    }


def fused_node(node: NodeProto, source: ModelSource) -> FusedNode:
    """What a node that `fused` or `pooled` has made computes, and on which tensors."""
    return _convolution(node, source) if node.op_type == "Conv" else _pool(node, source)


def _convolution(node: NodeProto, source: ModelSource) -> FusedNode:
    values = attributes_of(node)
    image, filters, bias, added = node.input
    kind = source.kind_of(image)
    what = FusedConvolution(
        kind.element_type,
        _onnx_order(kind.shape),
        source.kind_of(filters).shape or (),
        _onnx_order(source.kind_of(node.output[0]).shape),
        tuple(values["strides"]),
        tuple(values["dilations"]),
        tuple(values["pads"]),
        bool(bias),
        bool(added),
        bool(values["rectified"]),
    )
    return FusedNode(what, image, filters, bias or None, added or None, node.output[0])


def _pool(node: NodeProto, source: ModelSource) -> FusedNode:
    values = attributes_of(node)
    image, output = node.input[0], node.output[0]
    kind = source.kind_of(image)
    what = Pool(
        kind.element_type,
        _onnx_order(kind.shape),
        _onnx_order(source.kind_of(output).shape),
        tuple(values["kernel_shape"]),
        tuple(values["strides"]),
        tuple(values["pads"]),
        averages=node.op_type == "AveragePool",
        counts_padding=bool(values["count_include_pad"]),
    )
    return FusedNode(what, image, filters=None, bias=None, added=None, output=output)


def channels_last(filters: np.ndarray) -> np.ndarray:
    """Filters as they lie in memory beside images with channels last."""
    return np.ascontiguousarray(np.moveaxis(filters, 1, -1))


def weight_array(source: ModelSource, name: str) -> np.ndarray:
    """A weight of a fused convolution as it lies in memory."""
    array = numpy_helper.to_array(source.weight(name))
    return channels_last(array) if array.ndim == 4 else np.ascontiguousarray(array)


def _onnx_order(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """(images, channels, height, width) of (images, height, width, channels)."""
    images, height, width, channels = shape or ()
    return images, channels, height, width
