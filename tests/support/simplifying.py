"""Models before and after simplification, and whether both compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from onnxsched.shapes import tensor_types
from onnxsched.simplification import simplify
from onnxsched_runtime.model import name_nodes
from support.models import Array, feeds_for, reference
from support.optimizing import assert_close, parsed


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """What simplification makes of a model, which stays as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    simplify(copy, tensor_types(copy))
    return copy


def written(text: str, opset: int = 17, /, **weights: Array) -> onnx.ModelProto:
    """A model as its text says, in which ONNX Runtime's own operators may occur."""
    model = parsed(text, opset=opset)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def image_model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int],
    weights: Sequence[onnx.TensorProto],
    outputs: Sequence[str],
    opset: int = 17,
) -> onnx.ModelProto:
    """A model of images `x` of a shape, with outputs whose shapes are inferred."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list("nchw")) for n in outputs]
    graph = helper.make_graph(nodes, "g", [image], results, weights)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def op_types(model: onnx.ModelProto) -> list[str]:
    """The types of the nodes in their order."""
    return [node.op_type for node in model.graph.node]


def op_counts(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes there are of each type."""
    return Counter(op_types(model))


def assert_equivalent(
    changed: onnx.ModelProto, model: onnx.ModelProto, relative: float = 1e-5
) -> None:
    """Check that two models compute the same, and that the types the first declares are right."""
    names = [node.name for node in changed.graph.node]
    assert len(set(names)) == len(names)
    feeds = feeds_for(model, seed=0)
    assert_close(reference(changed, feeds), _unoptimized(model, feeds), relative)
    every = onnx.ModelProto()
    every.CopyFrom(changed)
    declared = tensor_types(changed)
    outputs = [tensor for node in changed.graph.node for tensor in node.output if tensor]
    assert set(outputs) <= set(declared)
    del every.graph.output[:]
    every.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    for name, value in zip(outputs, reference(every, feeds), strict=True):
        kind = declared[name]
        assert value.shape == kind.shape
        assert onnx.helper.np_dtype_to_tensor_dtype(value.dtype) == kind.element_type


def _unoptimized(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    """What ONNX Runtime computes operator by operator."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))
