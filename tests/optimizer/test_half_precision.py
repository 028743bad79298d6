"""Models in half precision compute nearly the same, whatever operators they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxsched.half_precision import in_float16, store_constants
from onnxsched.loading import load_model
from onnxsched_runtime.errors import ModelError
from support.models import CPU, feeds_for, reference, weight
from support.optimizing import assert_close, parsed, saved

SCALE = np.array(1e-6, np.float32)


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("(float[3] x) => (float[3] y) { c = Constant<value_float=2.0>() y = Mul(x, c) }", 17),
        (
            "(float[3] x) => (float[3] y)"
            "{ c = Constant<value_floats=[1.0, 2.0, 3.0]>() y = Mul(x, c) }",
            17,
        ),
        (
            "(float[3] x) => (float[3] y, float[1] c)"
            "{ c = Constant<value_floats=[2.0]>() y = Mul(x, c) }",
            17,
        ),
        (
            """(float[3] x, bool flag) => (float[3] y) {
                y = If(flag) <
                    then_branch = yes () => (float[3] u) {
                        c = Constant<value_float=2.0>()  u = Mul(x, c)
                    },
                    else_branch = no () => (float[3] v) {
                        c = Constant<value_float=3.0>()  v = Add(x, c)
                    }
                >
            }""",
            17,
        ),
        (
            "(float[3] x) => (float[3] y) { a = Mul(x, s) q = QuantizeLinear(a, s, z)"
            " d = DequantizeLinear(q, s, z) y = Div(d, s) }",
            13,
        ),
        (
            "(float[3] x) => (float[3] y)"
            "{ a, b, c = DynamicQuantizeLinear(x) y = DequantizeLinear(a, b, c) }",
            17,
        ),
        ("(float[3] x) => (float[3] y) { a = Celu(x) y = Exp(a) }", 17),
    ],
)
def test_operators_without_float16_stay_in_float32(text: str, opset: int, tmp_path: Path) -> None:
    model = parsed(text, opset=opset, s=SCALE, z=np.array(128, np.uint8))
    found = load_model(saved(model, tmp_path), CPU, precision="fp16")
    feeds = feeds_for(model)
    assert_close(reference(found.proto, feeds), reference(model, feeds), 2e-2)


@pytest.mark.parametrize("kind", ["RandomNormal", "RandomUniform"])
def test_random_numbers_are_drawn_in_float32(kind: str, tmp_path: Path) -> None:
    model = parsed(f"(float[3] x) => (float[3] y) {{ r = {kind}<shape=[3]>() y = Add(x, r) }}")
    found = load_model(saved(model, tmp_path), CPU, precision="fp16")
    (drawn,) = reference(found.proto, feeds_for(model))
    assert np.isfinite(drawn).all()


def test_scales_keep_their_precision() -> None:
    model = parsed(
        "(uint8[3] x) => (float[3] y)"
        "{ s = Constant<value = float {0.0}>()  y = DequantizeLinear(x, s) }",
        opset=13,
    )
    model.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(SCALE))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("s", 1, []))
    store_constants(model)
    found = in_float16(model)
    (kept,) = found.graph.initializer
    assert (kept.name, onnx.numpy_helper.to_array(kept)) == ("s", SCALE)
    declared = {value.name: value.type.tensor_type.elem_type for value in found.graph.value_info}
    assert declared.get("s", kept.data_type) == kept.data_type


def test_norms_are_computed_in_float16() -> None:
    model = parsed(
        "(float[2,4] x) => (float[2,4] y) { y = LayerNormalization(x, w) }", w=weight(4)
    )
    assert [w.data_type for w in in_float16(model).graph.initializer] == [onnx.TensorProto.FLOAT16]


@pytest.mark.parametrize(
    "kind", ["seq(float[3])", "optional(float[3])", "optional(seq(float[3]))"]
)
def test_outputs_that_would_change_their_type_are_refused(kind: str) -> None:
    model = parsed(f"(float[3] x) => ({kind} s) {{ s = Identity(x) }}")
    with pytest.raises(ModelError, match=r"^Output 's' is a sequence .*; leave .* fp16 out\.$"):
        in_float16(model)


def test_an_output_that_is_there_twice_stays_so(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y, float[3] z) { z = Neg(x) y = Exp(z) }")
    model.graph.output.add().CopyFrom(model.graph.output[0])
    found = load_model(saved(model, tmp_path), CPU, precision="fp16").proto
    assert [value.name for value in found.graph.output] == ["y", "z", "y"]
    feeds = feeds_for(model)
    assert_close(reference(found, feeds), reference(model, feeds), 2e-2)


@pytest.mark.parametrize(
    "text",
    [
        "{ o = Optional(x) a = OptionalGetElement(o) y = Exp(a) }",
        "{ s = SequenceConstruct(x) o = Optional(s) t = OptionalGetElement(o)"
        " i = Constant<value_int=0>() a = SequenceAt(t, i) y = Exp(a) }",
    ],
)
def test_optionals_between_operators_are_computed_in_float16(text: str, tmp_path: Path) -> None:
    model = parsed(f"(float[3] x) => (float[3] y) {text}")
    found = load_model(saved(model, tmp_path), CPU, precision="fp16").proto
    feeds = feeds_for(model)
    assert_close(reference(found, feeds), reference(model, feeds), 2e-2)


_BRANCHES = """(float[3] x, bool flag) => (float[3] y) {{
    o = If(flag) <
        then_branch = yes () => ({kind}(float[3]) u) {{ u = {op_type}(x) }},
        else_branch = no () => ({kind}(float[3]) v) {{ v = {op_type}(x) }}
    >
    {rest}
}}"""


def test_optionals_out_of_branches_are_refused() -> None:
    model = parsed(_BRANCHES.format(kind="optional", op_type="Optional", rest="y = Identity(x)"))
    with pytest.raises(ModelError, match=r"^'u' in operator 'If' is .*; leave .* fp16 out\.$"):
        in_float16(model)


def test_sequences_out_of_branches_are_computed_in_float16(tmp_path: Path) -> None:
    rest = "i = Constant<value_int=0>() a = SequenceAt(o, i) y = Exp(a)"
    model = parsed(_BRANCHES.format(kind="seq", op_type="SequenceConstruct", rest=rest))
    found = load_model(saved(model, tmp_path), CPU, precision="fp16").proto
    feeds = feeds_for(model)
    assert_close(reference(found, feeds), reference(model, feeds), 2e-2)


def test_sequences_of_integers_are_kept() -> None:
    model = parsed("(float[3] x, int64[2] i) => (seq(int64[2]) s) { s = SequenceConstruct(i, i) }")
    assert in_float16(model).graph.output == model.graph.output
