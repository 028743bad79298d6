"""Convolutions channels last take in bias, sum and Relu: what becomes one kernel. Pure.

ONNX Runtime has no such operator. So these nodes are of a domain of ours, and no session ever
sees them: executors launch them through cuDNN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxsched_runtime.model import (
    FUSED_DOMAIN,
    attributes_of,
    is_standard,
    node_reads,
    readers_of,
    renamed,
    sources_of,
)
from onnxsched_runtime.naming import unused_name
from onnxsched_runtime.ordering import topological
from onnxsched_runtime.pools import may_see_padding_alone
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.views import VIEWS

NHWC_DOMAIN = "com.ms.internal.nhwc"
"""Of what ONNX Runtime has lowered to channels last."""
_ELEMENT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
_KEEPS_SIGNS = ("MaxPool", "Concat", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten",
                "Slice")  # fmt: skip
"""What can as well be done after a Relu, bit for bit."""
_BRIEF = ("Concat", "Relu", "Transpose", *VIEWS)
"""What is not counted on the way to a tensor."""


def fused(source: ModelSource) -> ModelSource:
    """The lowered model with convolutions that take in what follows them.

    Relus also where there are several, or other operators that keep signs between. A sum only
    where the other summand is there before the convolution starts: it would wait for it else.
    O(nodes).

    Args:
        source: Lowered, channels last.
    """
    draft = _Draft(source)
    for node in list(draft.nodes.values()):
        if is_standard(node, "Add"):
            draft.take_in_sum(node)
    draft.take_in_relus()
    return draft.finished()


@dataclass
class _Fused:
    """A convolution that is becoming one kernel with what follows it."""

    node: NodeProto
    output: str
    added: str = ""
    rectified: bool = False


class _Draft:
    """A model on its way: which convolutions have taken in what."""

    def __init__(self, source: ModelSource) -> None:
        graph = source.model.graph
        self._source = source
        self.nodes = {node.name: node for node in graph.node}
        self._stored = {weight.name for weight in graph.initializer}
        self._writer = {t: node for node in graph.node for t in node.output if t}
        self._depth = _depths(source.model)
        self._fused: dict[str, _Fused] = {
            node.output[0]: _Fused(node, node.output[0])
            for node in graph.node
            if _is_fusable(node, source)
        }
        """By what they write."""
        self._renamed: dict[str, str] = {}
        """What tensors are called where a Relu has been left out."""
        self._readers = readers_of(graph.node)
        self._outputs = {value.name for value in graph.output}
        self._declared: dict[str, TensorType] = {}
        """Types of new tensors."""
        self._nowhere_negative: set[str] = set()

    def _is_read_once(self, tensor: str) -> bool:
        return len(self._readers.get(tensor, [])) + (tensor in self._outputs) == 1

    def take_in_sum(self, add: NodeProto) -> None:
        """Let a convolution add what an Add does, where that is early enough."""
        for mine, other in (add.input, reversed(add.input)):
            fused = self._fused.get(mine)
            if (
                fused is not None
                and not fused.added
                and self._is_read_once(mine)
                and mine != other
                and not self._source.is_weight(other)
                and self._source.kind_of(other) == self._source.kind_of(mine)
                and self._depth.get(other, 0) < self._depth[mine]
            ):
                fused.added = other
                self._replace(fused, add)
                return

    def take_in_relus(self) -> None:
        """Let convolutions rectify what only Relus read, perhaps behind operators that keep signs.

        Relus of what is nowhere negative any more are left out, and where a Concat joins one more
        tensor only that one is rectified: averages, for one, which come earlier than the rest.
        """
        only_rectified = self._only_rectified()
        for fused in self._fused.values():
            fused.rectified = fused.output in only_rectified
        self._nowhere_negative = self._found_nowhere_negative()
        for node in list(self.nodes.values()):
            if _is_relu(node) and node.input[0] in self._nowhere_negative:
                self._leave_out(node)
            elif _is_relu(node):
                self._rectify_sooner(node)

    def _only_rectified(self) -> set[str]:
        """The tensors that all readers rectify, perhaps behind operators that keep signs."""
        found: set[str] = set()
        for node in reversed(self._source.model.graph.node):
            for tensor in node.output:
                if tensor not in self._outputs and all(
                    _is_relu(reader) or (_keeps_signs(reader) and reader.output[0] in found)
                    for reader in self._readers.get(tensor, [])
                ):
                    found.add(tensor)
        return found

    def _found_nowhere_negative(self) -> set[str]:
        """The tensors that a Relu would not change."""
        found: set[str] = set()
        for node in self._source.model.graph.node:
            for tensor in node.output:
                if tensor in self._fused:
                    is_known = self._fused[tensor].rectified
                else:
                    is_kept = _keeps_signs(node) and found.issuperset(_moved_by(node))
                    is_known = is_kept or _is_relu(node)
                if is_known:
                    found.add(tensor)
        return found

    def _leave_out(self, relu: NodeProto) -> None:
        """Let what reads a Relu read what that reads; an output keeps its name."""
        read, written = self._name_of(relu.input[0]), relu.output[0]
        if written not in self._outputs:
            self._renamed[written] = read
        elif read not in self._outputs:
            self._renamed[read] = written
        else:
            return
        del self.nodes[relu.name]

    def _rectify_sooner(self, relu: NodeProto) -> None:
        """Let a Relu behind a Concat come before it, if one tensor is all that it changes."""
        joined, result = relu.input[0], relu.output[0]
        concat = self._writer.get(joined)
        if concat is None or concat.op_type != "Concat" or not _keeps_signs(concat):
            return
        if concat.name not in self.nodes:
            return
        changed = [t for t in dict.fromkeys(concat.input) if t not in self._nowhere_negative]
        if (
            len(changed) != 1
            or not self._is_read_once(joined)
            or self._source.is_weight(changed[0])
        ):
            return
        name = unused_name(
            f"{result}/rectified", self._source.tensors, self._declared, self._stored
        )
        self._declared[name] = self._source.kind_of(changed[0])
        own = {changed[0]: name, joined: result}
        self.nodes[concat.name] = _renamed(self.nodes[concat.name], own)
        self.nodes[relu.name] = _renamed(relu, {joined: changed[0], result: name})

    def _name_of(self, tensor: str) -> str:
        """What a tensor is called once Relus have been left out."""
        while tensor in self._renamed:
            tensor = self._renamed[tensor]
        return tensor

    def _replace(self, fused: _Fused, last: NodeProto) -> None:
        """Let a convolution write what `last` does, which it has taken in."""
        del self._fused[fused.output], self.nodes[last.name]
        fused.output = last.output[0]
        self._fused[fused.output] = fused

    def finished(self) -> ModelSource:
        """The model in topological order, and the types of what is left."""
        made = {fused.node.name: _made(fused) for fused in self._fused.values()}
        names = {tensor: self._name_of(tensor) for tensor in self._renamed}
        nodes = [_renamed(made.get(name, node), names) for name, node in self.nodes.items()]
        model = ModelProto()
        model.CopyFrom(self._source.model)
        del model.graph.node[:]
        model.graph.node.extend(_in_order(nodes))
        written = {t for node in nodes for t in node.output}
        ends = {value.name for value in model.graph.input}
        known = {**self._source.tensors, **self._declared}
        tensors = {name: kind for name, kind in known.items() if name in written or name in ends}
        return replace(self._source, model=model, tensors=tensors)


def _is_relu(node: NodeProto) -> bool:
    return is_standard(node, "Relu")


def _keeps_signs(node: NodeProto) -> bool:
    is_known = is_standard(node) or node.domain == NHWC_DOMAIN
    if not is_known or node.op_type not in _KEEPS_SIGNS or len(node.output) > 1:
        return False
    return node.op_type != "MaxPool" or not may_see_padding_alone(node)


def _moved_by(node: NodeProto) -> Sequence[str]:
    """What an operator that keeps signs takes its numbers from."""
    return list(node.input)[: None if node.op_type == "Concat" else 1]


def _is_fusable(node: NodeProto, source: ModelSource) -> bool:
    """Whether cuDNN can be asked for a convolution: one of images, with weights as stored."""
    if node.op_type != "Conv" or node.domain != NHWC_DOMAIN:
        return False
    values = attributes_of(node)
    kinds = [source.tensors.get(name) for name in (node.input[0], node.output[0])]
    stored = [name for name in node.input[1:] if name]
    return (
        values.get("auto_pad", b"NOTSET") == b"NOTSET"
        and all(map(is_image, kinds))
        and all(source.is_weight(name) for name in stored)
        and len(source.kind_of(node.input[1]).shape or ()) == 4
    )


def is_image(kind: TensorType | None) -> bool:
    """Whether a tensor is an image of numbers that cuDNN is asked to compute with."""
    return (
        kind is not None
        and kind.element_type in _ELEMENT_TYPES
        and kind.shape is not None
        and len(kind.shape) == 4
        and 0 not in kind.shape
    )


def _depths(model: ModelProto) -> dict[str, int]:
    """How many operators come before each tensor at least, one after another; inputs have 0.

    Only those that take time of their own.
    """
    depth: dict[str, int] = {}
    for node in model.graph.node:
        before = max((depth.get(tensor, 0) for tensor in node_reads(node)), default=0)
        after = before if is_standard(node, *_BRIEF) else before + 1
        depth |= dict.fromkeys(node.output, after)
    return depth


def _made(fused: _Fused) -> NodeProto:
    values: dict[str, Any] = {
        attribute.name: list(attribute.ints)
        for attribute in fused.node.attribute
        if attribute.name in ("strides", "dilations", "pads")
    }
    image, filters, *bias = fused.node.input
    return helper.make_node(
        "Conv",
        [image, filters, bias[0] if bias else "", fused.added],
        [fused.output],
        fused.node.name,
        domain=FUSED_DOMAIN,
        **{"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]} | values,
        rectified=int(fused.rectified),
    )


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """The node with other names for tensors; itself where it has none of these."""
    if names.keys().isdisjoint((*node.input, *node.output)):
        return node
    return renamed(node, names, names)


def _in_order(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, each after those that it reads from, else as they are."""
    return [nodes[number] for number in topological(range(len(nodes)), sources_of(nodes))]
