"""Relus after Concats and pools, instead of one before each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx

from onnxsched.pad_fusion import is_behind_pad
from onnxsched.simplification.replacing import GraphIndex, Replacement
from onnxsched_runtime.model import is_standard, node_reads, renamed
from onnxsched_runtime.naming import new_name
from onnxsched_runtime.pools import may_see_padding_alone

_KEEPS_SIGN = {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Concat",
    "Identity",
}
"""What makes no negative number where it reads none."""


def rectify_after_concat(model: onnx.ModelProto) -> int:
    """Make one Relu after a Concat of those before it, in place.

    The branches of inception and fire modules each end so. A Relu of a few microseconds is mostly
    launch, and they compete with the convolutions of other branches. An input that has no Relu
    but can't be negative either is no obstacle.

    Returns:
        How many operators fewer there are.
    """
    graph = model.graph
    readers: dict[str, int] = {value.name: 2 for value in graph.output}
    for node in graph.node:
        for tensor in node_reads(node):
            readers[tensor] = readers.get(tensor, 0) + 1
    writer: dict[str, onnx.NodeProto] = {}  # of what a Relu writes
    positive: set[str] = set()
    dropped: list[onnx.NodeProto] = []
    nodes: list[onnx.NodeProto] = []
    taken = _names(graph)
    declared = {value.name: value for value in (*graph.output, *graph.value_info)}
    for node in graph.node:
        nodes.append(node)
        is_positive = positive.issuperset(node.input)
        if not is_standard(node):
            continue
        if node.op_type == "Concat" and is_positive:
            movable = [writer[t] for t in dict.fromkeys(node.input) if t in writer]
            movable = [relu for relu in movable if readers[relu.output[0]] == 1]
            if len(movable) > 1:
                dropped += movable
                nodes.append(_moved(graph, node, movable, taken, declared))
        if node.op_type == "Relu" or (is_positive and _keeps_signs(node)):
            positive.add(nodes[-1].output[0])
        if nodes[-1].op_type == "Relu":
            writer[nodes[-1].output[0]] = nodes[-1]
    if not dropped:
        return 0
    gone = {node.output[0] for node in dropped}
    kept = [node for node in nodes if not gone.intersection(node.output)]
    removed = len(graph.node) - len(kept)
    del graph.node[:]
    graph.node.extend(kept)
    return removed


def _keeps_signs(node: onnx.NodeProto) -> bool:
    """Whether an operator makes no negative number where it reads none."""
    if node.op_type == "MaxPool" and may_see_padding_alone(node):
        return False
    return node.op_type in _KEEPS_SIGN


def _names(graph: onnx.GraphProto) -> set[str]:
    """What nodes and tensors are called."""
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node)
    return {value.name for value in values} | {t for node in graph.node for t in node.output}


def _moved(
    graph: onnx.GraphProto,
    concat: onnx.NodeProto,
    before: list[onnx.NodeProto],
    taken: set[str],
    declared: Mapping[str, onnx.ValueInfoProto],
) -> onnx.NodeProto:
    """Let a Concat read what its Relus read; returns the Relu that comes after it instead."""
    source = {node.output[0]: node.input[0] for node in before}
    result = concat.output[0]
    after = onnx.NodeProto()
    after.CopyFrom(before[0])
    after.name = new_name(f"{concat.name}/{before[0].op_type}", taken)
    after.input[:], after.output[:] = [new_name(f"{result}/joined", taken)], [result]
    if result in declared:
        joined = onnx.ValueInfoProto()
        joined.CopyFrom(declared[result])
        joined.name = after.input[0]
        graph.value_info.append(joined)
    concat.input[:] = [source.get(tensor, tensor) for tensor in concat.input]
    concat.output[:] = [after.input[0]]
    return after


def rectify_after_pool(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A Relu after a MaxPool instead of before it: the larger of two is rectified as both are.

    Only where the pool leaves fewer numbers than it reads.
    """
    if not is_standard(node, "MaxPool") or len(node.output) != 1 or may_see_padding_alone(node):
        return None
    relu = index.sole_writer(node.input[0], "Relu")
    sizes = [index.shape(tensor) for tensor in (node.input[0], node.output[0])]
    if relu is None or sizes[0] is None or sizes[1] is None:
        return None
    if math.prod(sizes[1]) >= math.prod(sizes[0]):
        return None
    result = node.output[0]
    pooled = index.unused(f"{result}/pooled")
    pool = renamed(node, {node.input[0]: relu.input[0]}, {result: pooled})
    if is_behind_pad(pool, index.writers):
        return None
    after = renamed(relu, {relu.input[0]: pooled}, {relu.output[0]: result})
    return Replacement((relu, node), (pool, after), tensors={pooled: index.tensors[result]})
