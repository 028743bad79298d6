"""Models computed in float16: what is left in float32, and what can't be converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched.graph import RANDOM_TYPES
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.model import give_outputs_a_node, is_standard, subgraphs
from onnxsched_runtime.session import to_float16

_HAS_FLOAT32_INPUTS = {"Resize"}
"""The converter leaves their inputs in float32 that must be, and converts the others."""


def in_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model with float32 made float16 inside.

    Raises:
        ModelError: An output is no tensor, or a subgraph's is an optional, but holds float32.
    """
    _refuse_branches(model.graph)
    for value in model.graph.output:
        if not value.type.HasField("tensor_type") and _holds_float32(value.type):
            raise ModelError(
                f"Output '{value.name}' is a sequence or optional of float32, which can't keep "
                "its type in half precision; leave --precision fp16 out."
            )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    store_constants(copy)
    give_outputs_a_node(copy)  # the converter knows no output that is a weight
    _forget_optionals(copy.graph)
    outputs = [*copy.graph.output]
    _set_outputs(copy.graph, {value.name: value for value in outputs}.values())
    converted = to_float16(copy, set(_float32_types(copy)))
    _set_outputs(converted.graph, outputs)
    return converted


def _set_outputs(graph: onnx.GraphProto, outputs: Iterable[onnx.ValueInfoProto]) -> None:
    """Replace a graph's outputs, in place: the converter knows none that is there twice."""
    kept = [*outputs]
    del graph.output[:]
    graph.output.extend(kept)


def _forget_optionals(graph: onnx.GraphProto) -> None:
    """Drop declarations of optionals, in place: the converter would not change them."""
    declared = [value for value in graph.value_info if not value.type.HasField("optional_type")]
    del graph.value_info[:]
    graph.value_info.extend(declared)


def _refuse_branches(graph: onnx.GraphProto) -> None:
    """Refuse optionals that subgraphs give: the converter does not change them."""
    for node in graph.node:
        for body in subgraphs(node):
            for value in body.output:
                if value.type.HasField("optional_type") and _holds_float32(value.type):
                    raise ModelError(
                        f"'{value.name}' in operator '{node.name or node.op_type}' is an optional "
                        "of float32, which can't be made half precision there; leave --precision "
                        "fp16 out."
                    )
            _refuse_branches(body)


def _holds_float32(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _holds_float32(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _holds_float32(kind.optional_type.elem_type)
    return bool(kind.tensor_type.elem_type == TensorProto.FLOAT)


def _float32_types(model: onnx.ModelProto) -> Iterator[str]:
    """Operator types that take or give float32 only, or draw numbers, which the CPU does in it."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for op_type, domain in {(node.op_type, node.domain) for node in model.graph.node}:
        if op_type in RANDOM_TYPES or _takes_float32_only(op_type, domain, versions):
            yield op_type


def _takes_float32_only(op_type: str, domain: str, versions: dict[str, int]) -> bool:
    if op_type in _HAS_FLOAT32_INPUTS or not onnx.defs.has(op_type, domain):
        return False
    schema = onnx.defs.get_schema(op_type, versions.get(domain, 1), domain)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional  # LayerNormalization's mean
    return any(
        "tensor(float)" in parameter.types and "tensor(float16)" not in parameter.types
        for parameter in (*schema.inputs, *schema.outputs)
        if parameter.option != optional
    )


def store_constants(model: onnx.ModelProto) -> None:
    """Make weights of Constants, in place: the converter knows no other way to write floats.

    In subgraphs Constants stay, and are written as tensors.
    """
    graph = model.graph
    kept = []
    for node in graph.node:
        value = _constant_value(node)
        if value is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
        for body in subgraphs(node):
            _write_as_tensors(body)
    del graph.node[:]
    graph.node.extend(kept)
    _forget_types_of_weights(graph)


def _write_as_tensors(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if (value := _constant_value(node)) is not None:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
        for body in subgraphs(node):
            _write_as_tensors(body)


def _constant_value(node: onnx.NodeProto) -> TensorProto | None:
    """What a Constant holds, if that is a tensor or floats."""
    if not is_standard(node, "Constant"):
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: TensorProto = attribute.t
            return tensor
        if attribute.name in ("value_float", "value_floats"):
            floats = np.asarray(helper.get_attribute_value(attribute), np.float32)
            return numpy_helper.from_array(floats)
    return None


def _forget_types_of_weights(graph: onnx.GraphProto) -> None:
    """Drop declarations that the converter would change, and the weights maybe not."""
    weights = {weight.name for weight in graph.initializer}
    declared = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(declared)
