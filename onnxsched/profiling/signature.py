"""What an operator's time depends on, as a key: equal operators are measured once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from onnx import TensorProto

from onnxsched.loading import Model
from onnxsched_runtime.annotation import attribute_digests
from onnxsched_runtime.model import STANDARD_DOMAINS, node_reads
from onnxsched_runtime.tensor import TensorType

_VALUE_NBYTES = 1024
"""Weights up to this may be shapes, axes or indices: their values count, not only their types."""


@dataclass(frozen=True)
class OperatorSignatures:
    """Signatures, sizes and operation counts of a model's nodes."""

    model: Model
    custom_ops: tuple[str, ...] = ()
    """Libraries of custom operators: what is in them decides how long theirs take."""

    @cached_property
    def _libraries(self) -> list[str]:
        return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.custom_ops]

    @cached_property
    def _weights(self) -> dict[str, TensorProto]:
        return {weight.name: weight for weight in self.model.proto.graph.initializer}

    def of(self, node: onnx.NodeProto) -> str:
        """A hash of type, attributes, and the types of everything that flows in and out."""
        opsets = {o.domain: o.version for o in self.model.proto.opset_import}
        parts = {
            "op": [node.domain, node.op_type, opsets.get(node.domain, 0)],
            "attributes": attribute_digests(node),
            "inputs": [self._input(name) for name in node.input],
            "outputs": [self._kind(name) for name in node.output],
            "variant": self.model.variant.to_json(),
        }
        if node.domain not in STANDARD_DOMAINS and self.custom_ops:
            parts["libraries"] = self._libraries
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _input(self, name: str) -> str:
        weight = self._weights.get(name)
        if weight is None:
            return self._kind(name)
        kind = TensorType(weight.data_type, tuple(weight.dims))
        if weight.data_type == TensorProto.FLOAT or kind.nbytes > _VALUE_NBYTES:
            return f"weight {kind}"
        unnamed = TensorProto()
        unnamed.CopyFrom(weight)
        unnamed.ClearField("name")
        return f"weight {kind} {hashlib.sha256(unnamed.SerializeToString()).hexdigest()}"

    def _kind(self, name: str) -> str:
        return str(self.model.tensors.get(name)) if name else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight or tensor; () where it is not known."""
        if name in self._weights:
            return tuple(self._weights[name].dims)
        kind = self.model.tensors.get(name)
        return kind.shape if kind and kind.shape else ()

    def nbytes(self, node: onnx.NodeProto) -> int:
        """Bytes a node must read and write at least once: a gather only reads what it picks."""
        names = [*node_reads(node), *filter(None, node.output)]
        if node.op_type.startswith("Gather"):
            return 2 * sum(self._nbytes(name) for name in node.output)
        return sum(self._nbytes(name) for name in names)

    def _nbytes(self, name: str) -> int:
        types: Mapping[str, TensorType] = self.model.tensors
        if name in self._weights:
            weight = self._weights[name]
            return TensorType(weight.data_type, tuple(weight.dims)).nbytes
        return types[name].nbytes if name in types else 0

    def flop_count(self, node: onnx.NodeProto) -> int:
        """Operations of a node: exact for convolutions and products, else one an element."""
        outputs = math.prod(self.shape(node.output[0]))
        if node.op_type == "ConvTranspose":
            inputs = math.prod(self.shape(node.input[0]))
            return 2 * inputs * math.prod(self.shape(node.input[1])[1:])
        if "Conv" in node.op_type:
            weight = node.input[3 if node.op_type == "QLinearConv" else 1]
            return 2 * outputs * math.prod(self.shape(weight)[1:])
        if "MatMul" in node.op_type or "Gemm" in node.op_type:
            flags = {a.name for a in node.attribute if a.name in ("transA", "transBatchA") and a.i}
            shape = self.shape(node.input[0])
            is_turned = "transA" in flags and len(shape) > 1  # of a vector nothing is
            inner = -1 if not is_turned else 0 if "transBatchA" in flags else -2
            return 2 * outputs * (shape[inner] if shape else 1)
        return outputs
