"""Lanes whose captured run may outlive its session. Pure.

Every session holds a cuDNN handle, and each of these 8 to 10 MB of a GPU's memory, whatever it
runs (`docs/adr/0010-one-arena-and-one-session-a-stream.md`). A captured run needs its session no
longer, if all that its kernels are given lies in memory of ours: what the lane reads, what it
writes for itself as for others, and its weights. Whether that is so shows in what was captured;
here is which lanes have a chance, and what they write then.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from onnxsched_runtime.lanes import Lane, written_instead
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.views import VIEWS, is_view

_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms.internal.nhwc")
_READS_TENSORS = {
    "Abs", "Add", "AveragePool", "BiasGelu", "Cast", "Concat", "Div", "Erf", "Exp", "FastGelu",
    "Gather", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "LeakyRelu", "Log", "Max", "MaxPool", "Min", "Mul", "Neg", "PRelu",
    "QuickGelu", "Reciprocal", "Relu", "Sigmoid", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt",
    "Sub", "Sum", "Tanh", "Transpose", "Where",
}  # fmt: skip
"""Operators whose kernels are given plain addresses. Products are not: theirs may be given
descriptions of tensors, in which addresses can't be told."""
_READS_SETTINGS = {"Clip", "Expand", "Pad", "Slice", "Split", *VIEWS}
"""Those that read one tensor; all else that they read is for the host."""


def outliving(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> Lane:
    """A lane that may do without its session once it is captured, or the lane as it is.

    It writes all that it computes to places that are given to it, but for views, which have the
    place of what they view. O(nodes).

    Args:
        source: The model.
        plan: The plan that the lane is of.
        lane: What a session runs.
    """
    nodes = [source.nodes[name] for i in lane.segments for name in plan.segments[i].nodes]
    if not all(_is_plain(source, node) for node in nodes):
        return lane
    placed = {*map(plan.original, lane.outputs), *written_instead(source, plan, lane).values()}
    inner = [
        plan.named(tensor, lane.placement.device)
        for node in nodes
        for tensor in node.output
        if tensor and not is_view(node) and tensor not in placed
    ]
    return replace(lane, outputs=(*lane.outputs, *inner), outlives=True)


def weights_to_place(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> tuple[str, ...]:
    """The weights that such a lane reads as tensors, which need places of ours too. O(nodes)."""
    nodes = [source.nodes[name] for i in lane.segments for name in plan.segments[i].nodes]
    read = (t for node in nodes for t in _tensors_read(node) if source.is_weight(t))
    return tuple(dict.fromkeys(read))


def _is_plain(source: ModelSource, node: NodeProto) -> bool:
    """Whether all that its kernels touch can be known, and lie where we want it."""
    if node.domain not in _DOMAINS or node.op_type not in _READS_TENSORS | _READS_SETTINGS:
        return False
    if node.op_type in _READS_SETTINGS and not all(
        map(source.is_weight, filter(None, node.input[1:]))
    ):
        return False
    weights = (t for t in _tensors_read(node) if source.is_weight(t))
    kinds = (source.tensors.get(tensor) for tensor in filter(None, node.output))
    return all(map(source.is_array, weights)) and all(
        k is not None and k.shape is not None for k in kinds
    )


def _tensors_read(node: NodeProto) -> list[str]:
    given = node.input[:1] if node.op_type in _READS_SETTINGS else node.input
    return list(filter(None, given))
