"""What a rewrite changes in a model, and the model that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched_runtime.model import input_values, name_nodes, node_reads
from onnxsched_runtime.naming import unused_name
from onnxsched_runtime.tensor import TensorType

_CONTRIBUTED = "com.microsoft"
"""ONNX Runtime's own operators, which a rewrite may be the first to use."""


@dataclass(frozen=True)
class Draft:
    """What changes in a model: filled step by step."""

    view: GraphView
    added: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    """New nodes, by the name of the old one that they come before."""
    removed: set[str] = field(default_factory=set)
    """Names of old nodes."""
    changed: dict[str, onnx.NodeProto] = field(default_factory=dict)
    """What takes the place of an old node, by name."""
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)
    """New weights, by name."""
    tensors: dict[str, TensorType] = field(default_factory=dict)
    """The types of new tensors."""

    def nodes(self) -> list[onnx.NodeProto]:
        """All nodes, in topological order where the old ones were."""
        nodes: list[onnx.NodeProto] = []
        for node in self.view.model.proto.graph.node:
            nodes += self.added.get(node.name, [])
            if node.name not in self.removed:
                nodes.append(self.changed.get(node.name, node))
        return nodes

    def store(self, name: str, array: np.ndarray) -> str:
        """Keep a new weight; returns its name."""
        weight = numpy_helper.from_array(np.ascontiguousarray(array), self._fresh(name))
        self.weights[weight.name] = weight
        return str(weight.name)

    def declare(self, name: str, kind: TensorType) -> str:
        """Announce a new tensor; returns its name."""
        fresh = self._fresh(name)
        self.tensors[fresh] = kind
        return fresh

    def _fresh(self, name: str) -> str:
        view = self.view
        return unused_name(
            name, view.model.tensors, view.weights, view.writer, self.tensors, self.weights
        )


def assembled(draft: Draft, rewrite: str) -> Model:
    """The model of a draft, under the name of the rewrite that made it. O(nodes and weights)."""
    model, old = draft.view.model, draft.view.model.proto.graph
    nodes = _read_nodes(draft)
    used = {name for node in nodes for name in node_reads(node)}
    unread = {w.name for w in old.initializer if w.name in draft.view.readers} - used
    flowing = {name for node in nodes for name in node.output}
    flowing |= {value.name for value in input_values(model.proto)}
    tensors = {**model.tensors, **draft.tensors}
    proto = onnx.ModelProto(
        ir_version=model.proto.ir_version,
        opset_import=model.proto.opset_import,
        metadata_props=model.proto.metadata_props,
    )
    domains = {node.domain for node in nodes} - {entry.domain for entry in proto.opset_import}
    if _CONTRIBUTED in domains:
        proto.opset_import.append(helper.make_opsetid(_CONTRIBUTED, 1))
    graph = proto.graph
    graph.name = old.name
    graph.node.extend(nodes)
    graph.initializer.extend(weight for weight in old.initializer if weight.name not in unread)
    graph.initializer.extend(draft.weights.values())
    graph.input.extend(value for value in old.input if value.name not in unread)
    graph.output.extend(old.output)
    graph.value_info.extend(value for value in old.value_info if value.name in flowing)
    graph.value_info.extend(
        helper.make_tensor_value_info(name, kind.element_type, kind.shape)
        for name, kind in draft.tensors.items()
    )
    name_nodes(proto)
    types = {name: kind for name, kind in tensors.items() if name in flowing}
    return replace(model, proto=proto, tensors=types, rewrite=rewrite)


def _read_nodes(draft: Draft) -> list[onnx.NodeProto]:
    """The nodes of a draft but for those that only replaced ones have read."""
    view, nodes = draft.view, draft.nodes()
    used = {name for node in nodes for name in node_reads(node)} | view.outputs
    return [
        node
        for node in nodes
        if used.intersection(node.output) or not any(map(view.readers.get, node.output))
    ]


def with_size(kind: TensorType, axis: int, size: int) -> TensorType:
    """A type with another size along one axis."""
    shape = list(kind.shape or ())
    shape[axis] = size
    return replace(kind, shape=tuple(shape))
