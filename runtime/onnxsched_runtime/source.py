"""A model that parts are cut out of, each ready for a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched_runtime.kernels import Kernels
from onnxsched_runtime.model import input_values, node_reads
from onnxsched_runtime.plan import Segment
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

_INLINE_NBYTES = 1024
"""Weights above this travel beside a segment's bytes, not in them: protobuf ends at 2 GiB."""
_INLINE_LIST_NBYTES = 1 << 16
"""The same for lists of integers: ORT reads sizes of a Split, or a shape, in the bytes only."""

_NUMPY_TYPES = {
    TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
"""Weights of other types (bfloat16, 8-bit floats, 4-bit integers, strings) stay in the bytes: ORT
takes none of them from an array."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A model ready for a session: its bytes, and the large weights that go beside them."""

    content: bytes
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ModelSource:
    """A model that segments are cut out of."""

    model: onnx.ModelProto
    tensors: Mapping[str, TensorType]
    variant: Variant = DEFAULT_VARIANT
    """How its sessions execute it; a layout other than ONNX's own is already in the nodes."""
    is_lowered: bool = False
    """ORT has made all of its optimizations; sessions make no more."""
    kernels: Kernels = field(default_factory=dict)
    """Which of cuDNN's kernels its convolutions and pools are computed by, as far as known."""

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """The nodes by name."""
        return {node.name: node for node in self.model.graph.node}

    @cached_property
    def ends(self) -> frozenset[str]:
        """The model's inputs and outputs."""
        graph = self.model.graph
        return frozenset(value.name for value in (*graph.input, *graph.output))

    @cached_property
    def _weights(self) -> dict[str, TensorProto]:
        return {weight.name: weight for weight in self.model.graph.initializer}

    @cached_property
    def _declared(self) -> dict[str, onnx.ValueInfoProto]:
        graph = self.model.graph
        return {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}

    def extract(self, segment: Segment, copies: Mapping[str, str] = {}) -> ModelPart:
        """Cut a segment out as a model of its own.

        Args:
            segment: Not a copy.
            copies: The tensors that those of the plan copy; see `ExecutionPlan`.
        """
        inputs = [copies.get(tensor, tensor) for tensor in segment.inputs]
        return self.part(segment.nodes, inputs, segment.outputs)

    def whole(self) -> ModelPart:
        """The model as it is, ready for a session."""
        return self.part(
            [node.name for node in self.model.graph.node],
            [value.name for value in input_values(self.model)],
            [value.name for value in self.model.graph.output],
        )

    def part(
        self, names: Sequence[str], inputs: Sequence[str], outputs: Sequence[str]
    ) -> ModelPart:
        """Cut the named nodes out, given what flows in and out; weights may flow in, too."""
        nodes = [self.nodes[name] for name in names]
        stored = self._weights.keys() - set(inputs)
        needed = chain(outputs, *map(node_reads, nodes))
        used = dict.fromkeys(tensor for tensor in needed if tensor in stored)
        weights = {name: array for name in used if (array := self.large_weight(name)) is not None}
        initializers = [_placeholder(self._weights[n]) if n in weights else self._weights[n]
                        for n in used]  # fmt: skip
        graph = helper.make_graph(
            [_without_metadata(node) for node in nodes],
            "segment",
            [self._value(name) for name in inputs],
            [self._value(name) for name in outputs],
            initializers,
        )
        part = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        return ModelPart(part.SerializeToString(), weights)

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is stored in the model."""
        return name in self._weights

    def kind_of(self, name: str) -> TensorType:
        """The type of a tensor or weight."""
        if name in self._weights:
            return TensorType(self._weights[name].data_type, tuple(self._weights[name].dims))
        return self.tensors[name]

    def weight(self, name: str) -> TensorProto:
        """A weight."""
        return self._weights[name]

    def large_weight(self, name: str) -> np.ndarray | None:
        """A weight that travels beside a segment's bytes; None for all other tensors."""
        if name not in self._weights:
            return None
        if name not in self._arrays:
            weight = self._weights[name]
            nbytes = TensorType(weight.data_type, tuple(weight.dims)).nbytes
            is_list = weight.data_type == TensorProto.INT64 and len(weight.dims) == 1
            most_nbytes = _INLINE_LIST_NBYTES if is_list else _INLINE_NBYTES
            if nbytes <= most_nbytes or not self.is_array(name):
                return None
            self._arrays[name] = np.ascontiguousarray(numpy_helper.to_array(weight))
        return self._arrays[name]

    def array(self, name: str) -> np.ndarray:
        """A weight that `is_array`."""
        large = self.large_weight(name)
        return numpy_helper.to_array(self._weights[name]) if large is None else large

    def is_array(self, name: str) -> bool:
        """Whether a weight is of a type that numpy has, too."""
        return self._weights[name].data_type in _NUMPY_TYPES

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """Large weights as arrays, converted when first used."""
        return {}

    def _value(self, name: str) -> onnx.ValueInfoProto:
        kind = self.kind_of(name) if self.is_weight(name) else self.tensors.get(name)
        if kind is None:
            return self._declared.get(name) or helper.make_empty_tensor_value_info(name)
        return helper.make_tensor_value_info(name, kind.element_type, kind.shape)


def _placeholder(weight: TensorProto) -> TensorProto:
    empty = TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
    empty.data_location = TensorProto.EXTERNAL
    entry = empty.external_data.add()
    entry.key, entry.value = "location", "beside"
    return empty


def _without_metadata(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.metadata_props[:]
    return copy
