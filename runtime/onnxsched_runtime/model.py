"""ONNX models in memory: their nodes, names, types, and what each node reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx
from onnx import helper

from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.naming import new_name
from onnxsched_runtime.plan import Operation
from onnxsched_runtime.tensor import TensorType

FUSED_DOMAIN = "onnxsched"
"""Of nodes that no session runs: what cuDNN computes, and what only moves numbers."""
STANDARD_DOMAINS = ("", "ai.onnx")
"""Of ONNX's own operators: two names for one."""


def declared_types(
    graph: onnx.GraphProto, weights: Iterable[onnx.TensorProto]
) -> dict[str, TensorType]:
    """The type of every tensor that a graph declares, weights and non-tensors left out."""
    left_out = {weight.name for weight in weights}
    types = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type") and value.name not in left_out:
            tensor = value.type.tensor_type
            dims = tensor.shape.dim
            static = tensor.HasField("shape") and all(map(is_fixed, dims))
            shape = tuple(dim.dim_value for dim in dims) if static else None
            types[value.name] = TensorType(tensor.elem_type, shape)
    return types


def is_fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether a dimension has a value; some exporters write -1 where it has none."""
    return bool(dim.HasField("dim_value") and dim.dim_value >= 0)


def input_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What the caller feeds: the declared inputs that are not weights."""
    weights = {weight.name for weight in model.graph.initializer}
    weights.update(weight.values.name for weight in model.graph.sparse_initializer)
    return [value for value in model.graph.input if value.name not in weights]


def name_nodes(model: onnx.ModelProto) -> None:
    """Make node names unique, keeping those that are."""
    counts = Counter(node.name for node in model.graph.node)
    unique = {name for name, count in counts.items() if name and count == 1}
    taken = set(unique)
    last: dict[str, int] = {}
    for node in model.graph.node:
        if node.name in unique:
            continue
        name = stem = node.name or f"{node.op_type}_{next(filter(None, node.output), '')}"
        while name in taken:
            last[stem] = last.get(stem, 0) + 1
            name = f"{stem}_{last[stem]}"
        node.name = name
        taken.add(name)


def give_outputs_a_node(model: onnx.ModelProto) -> None:
    """Put an Identity before outputs that ORT has folded to constants, in place.

    Raises:
        ModelError: An output is an input passed through.
    """
    graph = model.graph
    written = {name for node in graph.node for name in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    taken = written | weights.keys() | {value.name for value in graph.input}
    instead: dict[str, str] = {}
    for value in graph.output:
        if value.name in written:
            continue
        if value.name not in weights:
            raise ModelError(
                f"Output '{value.name}' is an input passed through, which no operator computes; "
                "remove it from the model's outputs."
            )
        constant = new_name(f"{value.name}/constant", taken)
        weights[value.name].name = constant
        instead[value.name] = constant
    read_instead(graph, instead)
    for name, constant in instead.items():
        graph.node.append(helper.make_node("Identity", [constant], [name]))


def read_instead(graph: onnx.GraphProto, instead: Mapping[str, str]) -> None:
    """Let every node read other tensors, those in subgraphs included, in place."""
    if not instead:
        return
    for node in graph.node:
        if not instead.keys().isdisjoint(node.input):
            node.input[:] = [instead.get(name, name) for name in node.input]
        for body in subgraphs(node):
            read_instead(body, instead)


def sources_of(nodes: Sequence[onnx.NodeProto]) -> list[list[int]]:
    """For each node those of the nodes that it reads from, by their places, each once."""
    writer = {tensor: i for i, node in enumerate(nodes) for tensor in node.output if tensor}
    return [sorted({writer[t] for t in node_reads(n) if t in writer}) for n in nodes]


def readers_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor or weight, each once, those whose subgraphs do included."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node_reads(node):
            readers.setdefault(name, []).append(node)
    return readers


def renamed(
    node: onnx.NodeProto,
    reads: Mapping[str, str],
    writes: Mapping[str, str] = MappingProxyType({}),
) -> onnx.NodeProto:
    """A copy of a node that reads, and writes, tensors of other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [reads.get(name, name) for name in node.input]
    copy.output[:] = [writes.get(name, name) for name in node.output]
    return copy


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """What a node runs inside, such as the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def node_reads(node: onnx.NodeProto) -> tuple[str, ...]:
    """The tensors a node needs, those its subgraphs take from outside included."""
    return tuple(dict.fromkeys([name for name in node.input if name] + list(captured_reads(node))))


def captured_reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node's subgraphs take from outside."""
    for graph in subgraphs(node):
        inner = {value.name for value in graph.input}
        inner |= {weight.name for weight in graph.initializer}
        for child in graph.node:
            yield from (name for name in node_reads(child) if name not in inner)
            inner.update(child.output)
        yield from (v.name for v in graph.output if v.name not in inner)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def is_standard(node: onnx.NodeProto, *op_types: str) -> bool:
    """Whether a node is an operator of ONNX's own, of one of these types where any are given."""
    return node.domain in STANDARD_DOMAINS and (not op_types or node.op_type in op_types)


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether no session runs a node."""
    return bool(node.domain == FUSED_DOMAIN)


def operations_from_model(
    model: onnx.ModelProto,
    placements: Mapping[str, Placement],
    host_reasons: Mapping[str, str],
) -> tuple[Operation, ...]:
    """The nodes as planning sees them, in launch order.

    Args:
        model: The model.
        placements: Node name to placement, in launch order.
        host_reasons: Why a node can't be captured, for those that can't.
    """
    weights = {weight.name for weight in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    return tuple(
        Operation(
            name=name,
            placement=placement,
            reads=tuple(t for t in node_reads(nodes[name]) if t not in weights),
            writes=tuple(t for t in nodes[name].output if t),
            host_reason=host_reasons.get(name),
            is_fused=is_fused(nodes[name]),
        )
        for name, placement in placements.items()
    )
