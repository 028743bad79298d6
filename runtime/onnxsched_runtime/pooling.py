"""Pools channels last become nodes of our domain, as convolutions do. Pure.

ONNX Runtime launches the kernels of cuDNN's old interface. Those of its graph API average in less
than a third of the time where there are many images.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import ModelProto, NodeProto, helper

from onnxsched_runtime.fusing import NHWC_DOMAIN, is_image
from onnxsched_runtime.model import FUSED_DOMAIN, attributes_of
from onnxsched_runtime.source import ModelSource

_RANK = 2
"""How many dimensions windows move along."""


def pooled(source: ModelSource) -> ModelSource:
    """The lowered model with pools that executors launch through cuDNN. O(nodes).

    Args:
        source: Lowered, channels last.
    """
    made = {node.name: _made(node) for node in source.model.graph.node if _fits(node, source)}
    model = ModelProto()
    model.CopyFrom(source.model)
    for node in model.graph.node:
        if node.name in made:
            node.CopyFrom(made[node.name])
    return replace(source, model=model)


def _fits(node: NodeProto, source: ModelSource) -> bool:
    """Whether cuDNN can be asked for a pool: of images, in windows without gaps."""
    if node.op_type not in ("MaxPool", "AveragePool") or node.domain != NHWC_DOMAIN:
        return False
    kinds = [source.tensors.get(name) for name in (node.input[0], *node.output)]
    values = attributes_of(node)
    if (
        not all(map(is_image, kinds))
        or values.get("auto_pad", b"NOTSET") != b"NOTSET"
        or any(step > 1 for step in values.get("dilations", ()))
    ):
        return False
    window, strides, pads = _form(node)
    begins, ends = pads[:_RANK], pads[_RANK:]
    before, after = (source.kind_of(t).shape or () for t in (node.input[0], node.output[0]))
    axes = zip(before[1:3], after[1:3], window, strides, begins, ends, strict=True)
    return (node.op_type == "MaxPool" or begins == ends) and all(
        (size + begin + end - span) // stride + 1 == count and max(begin, end) < span
        for size, count, span, stride, begin, end in axes
    )


def _form(node: NodeProto) -> tuple[list[int], list[int], list[int]]:
    """The window of a pool, its strides and its padding."""
    values = attributes_of(node)
    return (
        list(values["kernel_shape"]),
        list(values.get("strides") or [1] * _RANK),
        list(values.get("pads") or [0] * 2 * _RANK),
    )


def _made(node: NodeProto) -> NodeProto:
    window, strides, pads = _form(node)
    counts = attributes_of(node).get("count_include_pad")
    return helper.make_node(
        node.op_type,
        list(node.input),
        list(node.output),
        node.name,
        domain=FUSED_DOMAIN,
        kernel_shape=window,
        strides=strides,
        pads=pads,
        count_include_pad=int(bool(counts) and any(pads)),
    )
