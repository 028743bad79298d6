"""ONNX models as files and as parts: reading, writing whole, cutting out a segment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto, helper, numpy_helper

from onnxsched_runtime.convolution import Kernels
from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import ModelError, OnnxschedError, UsageError
from onnxsched_runtime.plan import Operation, Segment
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

_INLINE_NBYTES = 1024
"""Weights above this travel beside a segment's bytes, not in them: protobuf ends at 2 GiB."""
_FILE_NBYTES = 2**31 - 2**20
"""Models above this are written with their weights in a file of their own."""
_NUMPY_TYPES = {
    TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
"""Weights of other types (bfloat16, 8-bit floats, 4-bit integers, strings) stay in the bytes: ORT
takes none of them from an array."""
FUSED_DOMAIN = "onnxsched"
"""Of nodes that no session runs: convolutions that are launched through cuDNN."""


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model and its external data.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no ONNX model, or its external data is missing.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise UsageError(f"There is no file '{file}'; give the path of an ONNX model.")
    try:
        model = onnx.load(file, format="protobuf")
    except DecodeError as error:
        raise ModelError(f"'{file}' can't be read as an ONNX model ({error}).") from error
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"The weights beside '{file}' can't be read ({error}).") from error
    if not model.graph.node:
        raise ModelError(f"'{file}' holds no operators; export the model again.")
    return model


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft to write to, which takes the place of `path` only if all goes well.

    Links are followed; what is there and no regular file is never replaced.

    Raises:
        OnnxschedError: The file can't be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise OnnxschedError(f"'{path}' can't be written (it is no regular file); choose another.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            yield draft
            os.replace(draft, target)
    except OSError as error:
        reason = error.strerror or error
        raise OnnxschedError(f"'{path}' can't be written ({reason}); choose another.") from error


def write_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model whole or not at all; weights go to `PATH.data` above 2 GiB.

    Raises:
        OnnxschedError: The file can't be written.
    """
    content = serialized(model)
    with written_whole(path) as draft:
        if content is not None:
            draft.write_bytes(content)
        else:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            onnx.save(copy, draft, save_as_external_data=True, location=f"{draft.name}.data")
            os.replace(f"{draft}.data", f"{os.path.realpath(path)}.data")


def serialized(model: onnx.ModelProto) -> bytes | None:
    """A model as one file holds it; None above 2 GiB, which protobuf does not write.

    To ask for its size first would take as long again: protobuf serializes it for that.
    """
    try:
        content: bytes = model.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return content if len(content) < _FILE_NBYTES else None


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
    return [value for value in model.graph.input if value.name not in weights]


def name_nodes(model: onnx.ModelProto) -> None:
    """Make node names unique, keeping those that are."""
    taken: set[str] = set()
    last: dict[str, int] = {}
    for node in model.graph.node:
        name = stem = node.name or f"{node.op_type}_{next(filter(None, node.output), '')}"
        while name in taken:
            last[stem] = last.get(stem, 0) + 1
            name = f"{stem}_{last[stem]}"
        node.name = name
        taken.add(name)


def unused_name(stem: str, *taken: Container[str]) -> str:
    """A name that is in none of these."""
    while any(stem in names for names in taken):
        stem += "_"
    return stem


def new_name(stem: str, taken: set[str]) -> str:
    """A name that is not taken yet; it is then."""
    name = unused_name(stem, taken)
    taken.add(name)
    return name


def node_reads(node: onnx.NodeProto) -> tuple[str, ...]:
    """The tensors a node needs, those its subgraphs take from outside included."""
    return tuple(dict.fromkeys([name for name in node.input if name] + list(captured_reads(node))))


def captured_reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node's subgraphs take from outside."""
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
        for graph in graphs:
            inner = {value.name for value in graph.input}
            inner |= {weight.name for weight in graph.initializer}
            for child in graph.node:
                yield from (name for name in node_reads(child) if name not in inner)
                inner.update(child.output)
            yield from (v.name for v in graph.output if v.name not in inner)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether a node is launched through cuDNN, not by a session."""
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
    """Which of cuDNN's kernels its fused convolutions are computed by, as far as that is known."""

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """The nodes by name."""
        return {node.name: node for node in self.model.graph.node}

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
        used = dict.fromkeys(t for node in nodes for t in node_reads(node) if t in stored)
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

    def constant(self, name: str, renamed: str) -> TensorProto:
        """A weight under another name."""
        copy = TensorProto()
        copy.CopyFrom(self._weights[name])
        copy.name = renamed
        return copy

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
            if nbytes <= _INLINE_NBYTES or not self.is_array(name):
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
