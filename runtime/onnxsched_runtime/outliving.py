"""Lanes whose captured run may outlive its session. Pure.

Every session holds a cuDNN handle, and each of these 8 to 10 MB of a GPU's memory, whatever it
runs (`docs/adr/0010-one-arena-and-one-session-a-stream.md`). A captured run needs its session no
longer, if all that its kernels are given lies in memory of ours: what the lane reads, what it
writes for itself as for others, and its weights. Whether that is so shows in what was captured;
here is which lanes have a chance, and what they write then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from onnx import NodeProto

from onnxsched_runtime.fusing import NHWC_DOMAIN
from onnxsched_runtime.lanes import Lane, written_instead
from onnxsched_runtime.model import STANDARD_DOMAINS
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.views import VIEWS, is_view

_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft", NHWC_DOMAIN)
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
_WORTH_NBYTES = 8 << 20
"""What a session costs at least."""
_READS_SETTINGS = {"Clip", "Expand", "Pad", "Slice", "Split", *VIEWS}
"""Those that read one tensor; all else that they read is for the host."""


def outliving(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> Lane:
    """A lane that may do without its session once it is captured, or the lane as it is.

    It writes all that it computes to places that are given to it, but for views, which have the
    place of what they view. A lane stays as it is where sessions still fuse operators, or where
    those places would cost more than its session does. O(nodes).

    Args:
        source: The model.
        plan: The plan that the lane is of.
        lane: What a session runs.
    """
    segments = [[source.nodes[n] for n in plan.segments[i].nodes] for i in lane.segments]
    nodes = [node for segment in segments for node in segment]
    told = {t for node in nodes if node.op_type in _READS_SETTINGS for t in node.input[1:]}
    keeps_nodes = source.is_lowered or bool(lane.marks)
    if not keeps_nodes or not all(_is_plain(source, node, told) for node in nodes):
        return lane
    placed = {*map(plan.original, lane.outputs), *written_instead(source, plan, lane).values()}
    inner = {
        tensor: source.tensors[tensor].nbytes
        for node in nodes
        for tensor in node.output
        if tensor and not is_view(node) and tensor not in placed
    }
    if any(_surplus_nbytes(segment, inner) > _WORTH_NBYTES for segment in segments):
        return lane
    named = (plan.named(tensor, lane.placement.device) for tensor in inner)
    return replace(lane, outputs=(*lane.outputs, *named), outlives=True)


def weights_to_place(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> tuple[str, ...]:
    """The weights that such a lane reads as tensors, which need places of ours too. O(nodes)."""
    nodes = [source.nodes[name] for i in lane.segments for name in plan.segments[i].nodes]
    read = (t for node in nodes for t in _tensors_read(node) if source.is_weight(t))
    return tuple(dict.fromkeys(read))


def _surplus_nbytes(nodes: Sequence[NodeProto], inner: Mapping[str, int]) -> int:
    """What a segment's inner tensors take beside each other beyond what they need one by one.

    Arenas know when segments run, and not what runs when inside one.
    """
    last = {tensor: number for number, node in enumerate(nodes) for tensor in node.input}
    live = most = total = 0
    for number, node in enumerate(nodes):
        written = sum(inner.get(tensor, 0) for tensor in node.output)
        total += written
        live += written
        most = max(most, live)
        read = {tensor for tensor in node.input if last.get(tensor) == number}
        live -= sum(inner.get(tensor, 0) for tensor in read)
    return total - most


def _is_plain(source: ModelSource, node: NodeProto, told: Collection[str]) -> bool:
    """Whether all that its kernels touch can be known, and lie where we want it.

    Args:
        source: The model.
        node: The operator.
        told: What some operator's host is told.
    """
    if node.domain not in _DOMAINS or node.op_type not in _READS_TENSORS | _READS_SETTINGS:
        return False
    read = _tensors_read(node)
    settings = () if node.op_type in _READS_TENSORS else filter(None, node.input[1:])
    weights = [tensor for tensor in read if source.is_weight(tensor)]
    kinds = [source.tensors.get(tensor) for tensor in filter(None, node.output)]
    return (
        all(map(source.is_weight, settings))
        and all(source.is_array(w) and w not in told and source.kind_of(w).nbytes for w in weights)
        and all(kind is not None and kind.is_static for kind in kinds)
    )


def _tensors_read(node: NodeProto) -> list[str]:
    given = node.input[:1] if node.op_type in _READS_SETTINGS else node.input
    return list(filter(None, given))
