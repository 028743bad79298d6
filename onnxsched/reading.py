"""A model as users give it: valid, and in the form that all else starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.files import read_model, serialized
from onnxsched_runtime.model import sources_of, subgraphs
from onnxsched_runtime.ordering import topological
from onnxsched_runtime.tensor import fits_no_memory

_MIN_IR, _MAX_IR = 10, 13
"""Node metadata needs IR 10; ONNX Runtime 1.31 reads up to IR 13."""
_NORMS = {
    "SimplifiedLayerNormalization": ((), ("inv_std_var",)),
    "LayerNormalization": (("B",), ("mean", "inv_std_var")),
}
"""Norms of ONNX Runtime's in ONNX's domain: what inputs and outputs each may have more."""


def read_valid_model(path: str | Path) -> onnx.ModelProto:
    """Read a model; its functions are written out, and its weights dense and no inputs.

    Raises:
        UsageError: There is no such file.
        ModelError: It can't be read, is invalid, or holds what is not supported.
    """
    model = read_model(path)
    _sort(model.graph)
    allow_node_keys(model)  # before the check: old versions wanted weights to be inputs
    model.graph.name = model.graph.name or "graph"  # ORT needs none, the checker does
    _check(model, path)
    _densify(model.graph)
    _keep_weights(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        _densify(model.graph)
    return model


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes behind what they read from, as ORT does, those of subgraphs included, in place."""
    places = range(len(graph.node))
    order = topological(places, sources_of(graph.node))
    if order != [*places] and len(order) == len(places):  # else the checker names the circle
        nodes = [*graph.node]
        del graph.node[:]
        graph.node.extend(nodes[place] for place in order)
    for node in graph.node:
        for body in subgraphs(node):
            _sort(body)


def _check(model: onnx.ModelProto, path: str | Path) -> None:
    try:
        with _norms_registered(), _ranks_passed(model):
            onnx.checker.check_model(serialized(model) or str(path))
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).partition("==>")[0].split()).rstrip(".")
        raise ModelError(f"'{path}' is no valid ONNX model: {reason}; export it again.") from error
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"Input '{value.name}' of '{path}' is a sequence, map or optional; only models "
                "whose inputs are tensors can be measured."
            )


@contextmanager
def _ranks_passed(model: onnx.ModelProto) -> Iterator[None]:
    """Let the checker pass inputs and outputs of unknown rank, which are bound and inferred."""
    kinds = [
        value.type.tensor_type
        for value in (*model.graph.input, *model.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for kind in kinds:
        kind.shape.SetInParent()
    try:
        yield
    finally:
        for kind in kinds:
            kind.ClearField("shape")


@contextmanager
def _norms_registered() -> Iterator[None]:
    """Let onnx know the operators that ORT's fusions, and ours, add to ONNX's domain at any opset.

    One it does not have at all, the other from opset 17 on.
    """
    missing = [
        schema for schema in map(_norm_schema, _NORMS) if not onnx.defs.has(schema.name, 1, "")
    ]
    for schema in missing:
        onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        for schema in missing:
            onnx.defs.deregister_schema(schema.name, 1, "")


def _norm_schema(name: str) -> onnx.defs.OpSchema:
    """Of a norm as ORT has it, at every opset."""
    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    optional = schema.FormalParameterOption.Optional
    kinds = [f"tensor({kind})" for kind in ("float16", "bfloat16", "float", "double")]
    more_inputs, more_outputs = _NORMS[name]
    return schema(
        name,
        "",
        1,
        inputs=[
            parameter("X", "T"),
            parameter("scale", "V"),
            *(parameter(more, "V", param_option=optional) for more in more_inputs),
        ],
        outputs=[
            parameter("Y", "V"),
            *(parameter(more, "U", param_option=optional) for more in more_outputs),
        ],
        type_constraints=[(variable, kinds, "") for variable in "TUV"],
        attributes=[
            schema.Attribute("axis", schema.AttrType.INT, required=False),
            schema.Attribute("epsilon", schema.AttrType.FLOAT, required=False),
            schema.Attribute("stash_type", schema.AttrType.INT, required=False),
        ],
    )


def allow_node_keys(model: onnx.ModelProto) -> None:
    """Give a model an IR version that has them and that ORT reads, in place."""
    model.ir_version = max(_MIN_IR, min(model.ir_version, _MAX_IR))


def _keep_weights(model: onnx.ModelProto) -> None:
    """Let weights be no inputs as well, in place.

    Before IR version 4 all had to be, and meant nothing by it; later it means that a caller may
    replace them, which keeps ORT from folding and fusing, and no schedule offers.
    """
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _densify(graph: onnx.GraphProto) -> None:
    """Make sparse weights and constants dense, those of subgraphs included, in place.

    ORT saves the constants as sparse weights, which no schedule knows.

    Raises:
        ModelError: Dense, one fits into no memory.
    """
    graph.initializer.extend(map(_dense, graph.sparse_initializer))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                dense = _dense(attribute.sparse_tensor)
                attribute.CopyFrom(helper.make_attribute("value", dense))
        for body in subgraphs(node):
            _densify(body)


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    if fits_no_memory(list(sparse.dims)):
        raise ModelError(
            f"The sparse weight '{sparse.values.name}' of shape {list(sparse.dims)} fits into no "
            "memory when it is made dense, as ONNX Runtime does."
        )
    if sparse.values.data_type == onnx.TensorProto.STRING:
        raise ModelError(
            f"The sparse weight '{sparse.values.name}' holds strings, which ONNX Runtime does not "
            "read; store it as it is."
        )
    values, indices = (numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
    places = indices if indices.ndim == 1 else np.ravel_multi_index([*indices.T], sparse.dims)
    array = np.zeros(sparse.dims, values.dtype)
    array.flat[places] = values
    return numpy_helper.from_array(array, sparse.values.name)
