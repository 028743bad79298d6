"""A model's main graph, by who writes and who reads, and what its operators are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from onnxsched.loading import Model
from onnxsched_runtime.model import STANDARD_DOMAINS, attributes_of, is_standard, readers_of

Kind = tuple[str, str]
"""Domain and type of an operator."""
CONVOLUTIONS: frozenset[Kind] = frozenset({("", "Conv"), ("com.microsoft", "FusedConv")})
POOLS: frozenset[Kind] = frozenset({("", "MaxPool"), ("", "AveragePool")})

_UNARY = {
    ("", "Relu"), ("", "LeakyRelu"), ("", "Elu"), ("", "Sigmoid"), ("", "HardSigmoid"),
    ("", "HardSwish"), ("", "Tanh"), ("", "Gelu"), ("com.microsoft", "Gelu"),
    ("com.microsoft", "FastGelu"), ("com.microsoft", "QuickGelu"),
}  # fmt: skip
_BIASED = {("", "Add"), ("com.microsoft", "BiasGelu"), ("com.microsoft", "FastGelu")}


@dataclass(frozen=True)
class GraphView:
    """A model's main graph, by who writes and who reads."""

    model: Model

    @cached_property
    def position(self) -> dict[str, int]:
        """The place of each node in the model, by name."""
        return {node.name: number for number, node in enumerate(self.model.proto.graph.node)}

    @cached_property
    def writer(self) -> dict[str, onnx.NodeProto]:
        """The node that writes each tensor."""
        return {name: node for node in self.model.proto.graph.node for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each tensor or weight, each once."""
        return readers_of(self.model.proto.graph.node)

    @cached_property
    def weights(self) -> dict[str, onnx.TensorProto]:
        """What is stored in the model."""
        return {weight.name: weight for weight in self.model.proto.graph.initializer}

    @cached_property
    def outputs(self) -> frozenset[str]:
        """What the caller sees."""
        return frozenset(value.name for value in self.model.proto.graph.output)

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        versions = {entry.domain: entry.version for entry in self.model.proto.opset_import}
        version: int = max(versions.get(domain, 0) for domain in STANDARD_DOMAINS)
        return version

    @cached_property
    def _nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.proto.graph.node)

    def in_order(self, names: Iterable[str]) -> list[onnx.NodeProto]:
        """Some of the nodes, in the order of the model. O(names * log(names))."""
        return [self._nodes[place] for place in sorted(self.position[name] for name in names)]

    def only_reader(self, tensor: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None where several do, or the caller."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def array(self, name: str) -> np.ndarray:
        """A weight's values."""
        return numpy_helper.to_array(self.weights[name])


def kind_of(node: onnx.NodeProto) -> Kind:
    """Domain and type of a node."""
    return ("" if is_standard(node) else node.domain, node.op_type)


def is_elementwise(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node treats every element alike, or every element of a channel."""
    flowing = [name for name in node.input if name and name not in view.weights]
    given = [name for name in node.input if name in view.weights]
    if len(flowing) != 1:
        return False
    return kind_of(node) in (_BIASED if given else _UNARY) and len(given) <= 1


def is_dense_convolution(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution of all channels of which nothing stored is computed."""
    if kind_of(node) != ("", "Conv") or attributes_of(node).get("group", 1) != 1:
        return False
    kinds = [view.model.tensors.get(name) for name in (node.input[0], node.output[0])]
    return (
        all(name in view.weights for name in node.input[1:])
        and node.input[0] not in view.weights
        and all(kind is not None and len(kind.shape or ()) >= 3 for kind in kinds)
    )
