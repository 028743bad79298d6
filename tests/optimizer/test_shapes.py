"""Shapes that the user binds inputs to, and the types that follow from them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxsched.shapes import bind_shapes, parse_shapes, tensor_types
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.tensor import TensorType
from sample_models import build
from support.models import MODELS, weight
from support.optimizing import Shapes, loaded, parsed

FLOAT = onnx.TensorProto.FLOAT
SYMBOLIC = "(float[batch,3] x, float[batch,width] z) => (float[batch,3] y) { y = Relu(x) }"


def input_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }


@pytest.mark.parametrize(
    ("text", "name", "shape"),
    [
        ("x:1x3x224x224", "x", (1, 3, 224, 224)),
        ("x:7", "x", (7,)),
        ("x:0x4", "x", (0, 4)),
        ("x:scalar", "x", ()),
        ("scope/x:0:2x3", "scope/x:0", (2, 3)),
    ],
)
def test_a_shape_is_read(text: str, name: str, shape: tuple[int, ...]) -> None:
    assert parse_shapes([text]) == {name: shape}


@pytest.mark.parametrize("text", ["x", "x:", ":1x3", "x:1x", "x:axb", "x:-1x3", "x=1x3", ""])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="can't be read: write NAME:1x3x224x224") as caught:
        parse_shapes([text])
    assert caught.value.exit_code == 2


def test_a_symbol_bound_once_is_bound_in_every_input() -> None:
    model = parsed("(float[n,3] x, float[n,n] z) => (float[n,3] y) { y = Relu(x) }")
    bind_shapes(model, {"x": (5, 3)})
    assert input_shapes(model) == {"x": [5, 3], "z": [5, 5]}


def test_bound_shapes_flow_to_the_outputs() -> None:
    model = parsed("(float[n,3] x) => (float[m,3] y) { a = Relu(x)  y = Concat<axis = 0>(a, a) }")
    bind_shapes(model, {"x": (5, 3)})
    assert tensor_types(model) == {
        "x": TensorType(FLOAT, (5, 3)),
        "a": TensorType(FLOAT, (5, 3)),
        "y": TensorType(FLOAT, (10, 3)),
    }


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_an_input_of_unknown_rank_takes_any_shape(shape: tuple[int, ...]) -> None:
    model = parsed("(float[1] x) => (float[1] y) { y = Relu(x) }")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    bind_shapes(model, {"x": shape})
    assert tensor_types(model)["x"] == TensorType(FLOAT, shape)


@pytest.mark.parametrize("name", MODELS)
def test_a_static_model_is_left_as_it_is(name: str) -> None:
    model = MODELS[name]()
    before = [value.SerializeToString() for value in model.graph.input]
    bind_shapes(model, {})
    assert [value.SerializeToString() for value in model.graph.input] == before


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"x\[0\] \('batch'\), z\[0\] \('batch'\), z\[1\] \('width'\); give each input"),
        ({"x": (4, 3)}, r"have no value: z\[1\] \('width'\); give each input its shape with"),
        ({"x": (4,), "z": (4, 2)}, "gives 'x' 1 dimensions, it has 2"),
        ({"x": (4, 5), "z": (4, 2)}, r"gives x\[1\] 5, but it is 3"),
        ({"x": (4, 3), "z": (6, 2)}, r"gives z\[0\] 6, but it is 4"),
        ({"x": (2**40, 3), "z": (2**40, 2**20)}, r"Input 'z' of shape \[\d+, 1048576\] fits into"),
        ({"q": (4,)}, r"names 'q', which is no input; the inputs are \['x', 'z'\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(shapes: Shapes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind_shapes(parsed(SYMBOLIC), shapes)


def test_minus_one_is_a_dimension_without_a_value() -> None:
    model = parsed("(float[n,3] x) => (float[n,3] y) { y = Relu(x) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    with pytest.raises(UsageError, match=r"have no value: x\[0\]; give"):
        bind_shapes(model, {})
    bind_shapes(model, {"x": (2, 3)})
    assert input_shapes(model) == {"x": [2, 3]}


def test_weights_among_the_inputs_need_no_shape() -> None:
    model = parsed("(float[n] x, float[k] w) => (float[n] y) { y = Add(x, w) }", w=weight(3))
    bind_shapes(model, {"x": (3,)})
    with pytest.raises(UsageError, match=r"names 'w', which is no input; the inputs are \['x'\]"):
        bind_shapes(model, {"w": (3,)})


def test_sequences_and_weights_have_no_tensor_type() -> None:
    assert tensor_types(MODELS["sequence"]()).keys().isdisjoint({"parts", "hidden"})
    assert "table" not in tensor_types(MODELS["large_weight"]())


def test_a_shape_that_depends_on_data_is_not_known() -> None:
    types = tensor_types(MODELS["data_dependent"]())
    assert types["kept"] == TensorType(FLOAT, None)
    assert types["total"] == TensorType(FLOAT, ())


def test_operators_that_onnxruntime_fused_keep_their_types(tmp_path: Path) -> None:
    for sample in (build("tiny"), gelu()):
        model = loaded(sample, tmp_path)
        assert any(node.domain == "com.microsoft" for node in model.proto.graph.node)
        outputs = {name for node in model.proto.graph.node for name in node.output}
        assert all(model.tensors[name].is_static for name in outputs)


def gelu() -> onnx.ModelProto:
    return parsed(
        """(float[2,8] x) => (float[2,8] y) {
            a = Add(x, bias)
            b = Div(a, root)
            c = Erf(b)
            d = Add(c, one)
            e = Mul(a, d)
            f = Mul(e, half)
            y = Neg(f)
        }""",
        bias=weight(8),
        root=weight(1) * 0 + 2**0.5,
        one=weight(1) * 0 + 1,
        half=weight(1) * 0 + 0.5,
    )
