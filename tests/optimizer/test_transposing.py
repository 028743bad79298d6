"""Products with transposed matrices compute what they did; others are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, helper, numpy_helper

from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.rewriting import possible_rewrites, rewritten
from onnxsched.transposing import find_products
from onnxsched_runtime.variant import DEFAULT_VARIANT
from support.models import CPU, Array, feeds_for, reference
from support.optimizing import as_it_is, assert_close
from support.strategies import GPU


def product(
    op_type: str,
    first: tuple[int, ...],
    second: tuple[int, ...],
    result: tuple[int, ...],
    *,
    bias: Array | None = None,
    **attributes: Any,
) -> Model:
    """The product of `x` and a stored matrix `w`."""
    domain = "com.microsoft" if op_type == "FusedMatMul" else ""
    inputs = ["x", "w", *(["bias"] if bias is not None else [])]
    node = helper.make_node(op_type, inputs, ["y"], "product", domain=domain, **attributes)
    random = np.random.default_rng(0)
    weights = [numpy_helper.from_array(random.standard_normal(second, np.float32), "w")]
    if bias is not None:
        weights.append(numpy_helper.from_array(bias, "bias"))
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, first)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    return as_it_is(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@st.composite
def products(draw: DrawFn) -> Model:
    rows, inner, columns = (draw(st.integers(1, 5)) for _ in range(3))
    op_type = draw(st.sampled_from(["MatMul", "FusedMatMul", "Gemm"]))
    batch = () if op_type == "Gemm" else tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    first = (*batch, rows, inner)
    attributes = {"transA": 0, "transB": 0} if op_type != "MatMul" and draw(st.booleans()) else {}
    bias = np.arange(columns, dtype=np.float32)
    has_bias = op_type == "Gemm" and draw(st.booleans())
    return product(
        op_type, first, (inner, columns), (*batch, rows, columns),
        bias=bias if has_bias else None, **attributes,
    )  # fmt: skip


@given(products())
@settings(deadline=None)
def test_products_stay_what_they_were(model: Model) -> None:
    result = rewritten(model, "transposed")
    [node] = result.proto.graph.node
    assert node.name == "product"
    assert node.op_type != "MatMul"
    after = GraphView(result).array(node.input[1])
    np.testing.assert_array_equal(after, GraphView(model).array("w").T)
    assert "w" not in GraphView(result).weights
    feeds = feeds_for(model.proto, seed=1)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
    assert result.proto == rewritten(model, "transposed").proto
    assert not find_products(GraphView(result))


def changed(model: Model, change: str) -> Model:
    """A product that is left alone for one reason."""
    graph = model.proto.graph
    if change == "read twice":
        graph.node.add().CopyFrom(helper.make_node("Transpose", ["w"], ["z"], "other"))
        graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (3, 4)))
    elif change == "given":
        [weight] = graph.initializer
        graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.dims))
        del graph.initializer[:]
    return as_it_is(model.proto)


@pytest.mark.parametrize(
    "model",
    [
        product("MatMul", (5, 2, 4), (5, 4, 3), (5, 2, 3)),
        product("MatMul", (4,), (4, 3), (3,)),
        product("Gemm", (2, 4), (3, 4), (2, 3), transB=1),
        product("FusedMatMul", (2, 4), (3, 4), (2, 3), transB=1),
        product("FusedMatMul", (4, 2), (4, 3), (2, 3), transA=1),
        changed(product("MatMul", (2, 4), (4, 3), (2, 3)), "read twice"),
        changed(product("MatMul", (2, 4), (4, 3), (2, 3)), "given"),
    ],
    ids=[
        "stack",
        "vector",
        "gemm",
        "fused",
        "first",
        "read twice",
        "given",
    ],
)
def test_others_stay_alone(model: Model) -> None:
    assert find_products(GraphView(model)) == []
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT).alike == ()
    assert list(rewritten(model, "transposed").proto.graph.node) == list(model.proto.graph.node)


def test_it_is_tried_on_gpus_only() -> None:
    model = product("MatMul", (2, 4), (4, 3), (2, 3))
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT).alike == ("transposed",)
    assert possible_rewrites(model, CPU, DEFAULT_VARIANT).alike == ()
    onnx.checker.check_model(rewritten(model, "none").proto)
