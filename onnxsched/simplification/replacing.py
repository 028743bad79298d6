"""Replacing operators by others: what a rule sees, what it answers, and how it is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched_runtime.model import captured_reads, is_standard, node_reads, readers_of
from onnxsched_runtime.naming import unused_name
from onnxsched_runtime.tensor import TensorType

_T = TypeVar("_T")
_SCALAR_COUNT = 16
"""Weights of more elements are never looked into: rules ask for scalars, axes and the like."""


@dataclass(frozen=True)
class GraphIndex:
    """The main graph, by what a rule asks for."""

    writers: Mapping[str, onnx.NodeProto]
    """The node that writes a tensor."""
    readers: Mapping[str, tuple[onnx.NodeProto, ...]]
    """The nodes that read a tensor, each once; those whose subgraphs do included."""
    outputs: frozenset[str]
    """The outputs of the model."""
    weights: Mapping[str, TensorProto]
    tensors: Mapping[str, TensorType]
    """The types of tensors that flow."""
    names: frozenset[str]
    """The names of the nodes."""

    def writer(self, tensor: str, *op_types: str) -> onnx.NodeProto | None:
        """The standard operator that writes a tensor, if it is of one of these types."""
        node = self.writers.get(tensor)
        return node if node is not None and is_standard(node, *op_types) else None

    def sole_writer(self, tensor: str, *op_types: str) -> onnx.NodeProto | None:
        """Like `writer`, if a single operator reads the tensor, and it is no output."""
        return None if self.sole_reader(tensor) is None else self.writer(tensor, *op_types)

    def sole_reader(self, tensor: str) -> onnx.NodeProto | None:
        """The only node that reads a tensor, in no subgraph; None if it is an output."""
        readers = self.readers.get(tensor, ())
        if tensor in self.outputs or len(readers) != 1 or tensor in captured_reads(readers[0]):
            return None
        return readers[0]

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """The shape of a tensor that flows; None where it is not known."""
        kind = self.tensors.get(tensor)
        return None if kind is None else kind.shape

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of a small weight; None for anything else."""
        weight = self.weights.get(tensor)
        if weight is None or np.prod(weight.dims, dtype=np.int64) > _SCALAR_COUNT:
            return None
        return numpy_helper.to_array(weight)

    def is_scalar(self, tensor: str, value: float) -> bool:
        """Whether a tensor is a weight of one element with this value."""
        found = self.constant(tensor)
        return found is not None and found.size == 1 and found.item() == value

    def unused(self, stem: str) -> str:
        """A name that no tensor and no node has yet."""
        return unused_name(stem, self.tensors, self.writers, self.weights, self.names)


@dataclass(frozen=True)
class Replacement:
    """Operators that take the place of others; they write all that is still read."""

    old: tuple[onnx.NodeProto, ...]
    new: tuple[onnx.NodeProto, ...]
    weights: tuple[TensorProto, ...] = ()
    tensors: Mapping[str, TensorType] = field(default_factory=dict)
    """The types of tensors that are new."""


Rule = Callable[[GraphIndex, onnx.NodeProto], Replacement | None]
"""What to replace, given the node where a pattern ends."""


def attribute(node: onnx.NodeProto, name: str, default: _T) -> _T:
    """The value of an attribute."""
    for found in node.attribute:
        if found.name == name:
            value: _T = helper.get_attribute_value(found)
            return value
    return default


def with_attributes(node: onnx.NodeProto, **values: list[int] | int) -> onnx.NodeProto:
    """A copy of a node with other values of some attributes."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.attribute[:]
    copy.attribute.extend(found for found in node.attribute if found.name not in values)
    copy.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    return copy


def replace_all(model: onnx.ModelProto, rule: Rule, tensors: dict[str, TensorType]) -> int:
    """Carry out a rule wherever it applies now, in place; what is next to a replacement waits.

    Takes linear time, beside the rule's.

    Args:
        model: The model.
        rule: The rule.
        tensors: The types of its tensors; new ones are added.

    Returns:
        How many replacements were made; none are left once it is 0.
    """
    index = _index(model, tensors)
    changed: set[str] = set()
    needed: set[str] = set()
    replacements = []
    for node in model.graph.node:
        found = rule(index, node)
        if found is None:
            continue
        sources = {t for new in found.new for t in node_reads(new)} & index.writers.keys()
        gone, read = {old.name for old in found.old}, {index.writers[t].name for t in sources}
        if changed.isdisjoint(gone | read) and needed.isdisjoint(gone):
            changed |= gone
            needed |= read
            replacements.append(found)
    if replacements:
        _carry_out(model.graph, replacements)
        for found in replacements:
            tensors.update(found.tensors)
    return len(replacements)


def _index(model: onnx.ModelProto, tensors: Mapping[str, TensorType]) -> GraphIndex:
    return GraphIndex(
        {tensor: node for node in model.graph.node for tensor in node.output if tensor},
        {tensor: tuple(nodes) for tensor, nodes in readers_of(model.graph.node).items()},
        frozenset(value.name for value in model.graph.output),
        {weight.name: weight for weight in model.graph.initializer},
        tensors,
        frozenset(node.name for node in model.graph.node),
    )


def _carry_out(graph: onnx.GraphProto, replacements: list[Replacement]) -> None:
    gone = {old.name for found in replacements for old in found.old}
    instead: dict[str, list[onnx.NodeProto]] = {}
    for found in replacements:
        places = {old.name for old in found.old}
        for new in found.new:
            place = new.name if new.name in places else found.old[-1].name
            instead.setdefault(place, []).append(new)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += instead.get(node.name, ())
        if node.name not in gone:
            nodes.append(node)
    nodes = _topological(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    for found in replacements:
        graph.initializer.extend(found.weights)
        graph.value_info.extend(_declarations(found.tensors))


def _declarations(tensors: Mapping[str, TensorType]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, kind.element_type, kind.shape)
        for name, kind in tensors.items()
    ]


def _topological(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes in their order, but what one reads from is moved before it; linear time."""
    writers = {tensor: i for i, node in enumerate(nodes) for tensor in node.output if tensor}
    reads = [[writers[t] for t in node_reads(node) if t in writers] for node in nodes]
    order: dict[int, None] = {}
    for index in range(len(nodes)):
        waiting = [index]
        while waiting:
            missing = [source for source in reads[waiting[-1]] if source not in order]
            if missing:
                waiting += reversed(missing)
            else:
                order[waiting.pop()] = None
    return [nodes[index] for index in order]


def declare(model: onnx.ModelProto, tensors: Mapping[str, TensorType]) -> None:
    """Write types into the model, in place: of fused operators, onnx would infer none."""
    graph = model.graph
    declared = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    graph.value_info.extend(_declarations({n: tensors[n] for n in tensors if n not in declared}))
    for value in graph.output:
        if value.name in tensors and tensors[value.name].shape is not None:
            value.type.CopyFrom(_declarations({value.name: tensors[value.name]})[0].type)


def remove_unused(model: onnx.ModelProto) -> None:
    """Remove nodes that nothing reads, weights and declarations of tensors left over, in place."""
    graph = model.graph
    read = {value.name for value in graph.output}
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        if read.isdisjoint(node.output):
            del graph.node[position]
        else:
            read.update(node_reads(node))
    read |= {value.name for value in graph.input}
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in read:
            del graph.initializer[position]
    read |= {tensor for node in graph.node for tensor in node.output}
    declared = [value for value in graph.value_info if value.name in read]
    del graph.value_info[:]
    graph.value_info.extend(declared)
