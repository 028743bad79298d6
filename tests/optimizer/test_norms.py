"""RMS norms become one operator, together with the residual sum before them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from support.models import weight
from support.simplifying import assert_equivalent, op_types, simplified, written

FUSED, SKIP = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
CONSTANTS = {
    "two": np.array(2, np.float32),
    "one": np.array(1, np.float32),
    "tiny": np.array(1e-6, np.float32),
    "gamma": weight(8),
}
SQUARES = ("s = Pow(x, two)", "s = Mul(x, x)")
DIVISIONS = (
    "n = Div(x, r)",
    "i = Reciprocal(r) n = Mul(x, i)",
    "i = Reciprocal(r) n = Mul(i, x)",
    "i = Div(one, r) n = Mul(x, i)",
)


def norm(
    square: str = SQUARES[0],
    division: str = DIVISIONS[1],
    mean: str = "ReduceMean<axes = [-1]>",
    total: str = "m, tiny",
    scaling: str = "gamma, n",
) -> str:
    """The lines that compute the norm `y` of `x`."""
    return f"{square} m = {mean}(s) a = Add({total}) r = Sqrt(a) {division} y = Mul({scaling})"


def normed(lines: str, signature: str = "(float[2,3,8] x) => (float[2,3,8] y)") -> onnx.ModelProto:
    return written(f"{signature} {{ {lines} }}", **CONSTANTS)


@st.composite
def norms(draw: DrawFn) -> onnx.ModelProto:
    """Norms as exporters write them, of any shape, after a sum or not."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.sampled_from([-1, len(shape) - 1]))
    lines = norm(
        draw(st.sampled_from(SQUARES)),
        draw(st.sampled_from(DIVISIONS)),
        f"ReduceMean<axes = [{axis}]>",
        draw(st.sampled_from(["m, tiny", "tiny, m"])),
        draw(st.sampled_from(["gamma, n", "n, gamma"])),
    )
    kind = f"float[{','.join(map(str, shape))}]"
    before = draw(st.sampled_from(["x = Neg(p)", "x = Add(p, q)"]))
    outputs = draw(st.sampled_from([f"{kind} y", f"{kind} y, {kind} x", f"{kind} x, {kind} y"]))
    constants = {**CONSTANTS, "gamma": weight(shape[-1])}
    return written(f"({kind} p, {kind} q) => ({outputs}) {{ {before} {lines} }}", **constants)


@given(norms())
@settings(max_examples=60, deadline=None)
def test_every_way_to_write_a_norm_becomes_one_operator(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    summed = model.graph.node[0].op_type == "Add"
    expected = [SKIP] if summed and rank in (2, 3) else [model.graph.node[0].op_type, FUSED]
    assert op_types(changed) == expected
    assert {weight.name for weight in changed.graph.initializer} == {"gamma"}
    assert_equivalent(changed, model)


def test_axes_may_be_an_input() -> None:
    model = written(
        """(float[2,3,8] x) => (float[2,3,8] y) {
            s = Mul(x, x) m = ReduceMean(s, last) a = Add(m, tiny) r = Sqrt(a)
            n = Div(x, r) y = Mul(n, gamma)
        }""",
        18,
        last=np.array([-1]),
        **CONSTANTS,
    )
    changed = simplified(model)
    assert op_types(changed) == [FUSED]
    assert_equivalent(changed, model)


def test_the_newest_norm_takes_the_sum_in_too() -> None:
    model = written(
        """(float[2,3,8] p, float[2,3,8] q) => (float[2,3,8] y, float[2,3,8] z) {
            x = Add(p, q) y = RMSNormalization<epsilon = 1e-6>(x, gamma) z = Neg(x)
        }""",
        23,
        gamma=CONSTANTS["gamma"],
    )
    changed = simplified(model)
    assert op_types(changed) == [SKIP, "Neg"]
    assert_equivalent(changed, model)


def test_half_precision_is_fused_too() -> None:
    constants = {name: value.astype(np.float16) for name, value in CONSTANTS.items()}
    constants["tiny"] = np.array(1e-3, np.float16)
    model = written(
        f"(float16[3,8] p, float16[3,8] q) => (float16[3,8] y) {{ x = Add(p, q) {norm()} }}",
        **constants,
    )
    changed = simplified(model)
    assert op_types(changed) == [SKIP]
    assert_equivalent(changed, model, 1e-2)


def test_a_chain_of_residual_sums_keeps_each_sum() -> None:
    def block(number: int) -> str:
        names = {"x": f"x{number}", "y": f"y{number}"} | {
            old: f"{old}{number}" for old in ("s", "m", "a", "r", "i", "n")
        }
        words = norm().replace("(", "( ").replace(",", " ,").replace(")", " )").split()
        return " ".join(names.get(word, word) for word in words)

    lines = f"x0 = Neg(x) {block(0)} x1 = Add(x0, y0) {block(1)} x2 = Add(x1, y1) {block(2)}"
    model = normed(lines, "(float[2,3,8] x) => (float[2,3,8] y2)")
    changed = simplified(model)
    assert op_types(changed) == ["Neg", FUSED, SKIP, SKIP]
    assert_equivalent(changed, model)


SUM = "(float[2,3,8] p, float[8] q) => (float[2,3,8] y)"


@pytest.mark.parametrize(
    "model",
    [
        normed(norm(mean="ReduceMean<axes = [1]>")),
        normed(norm(mean="ReduceMean<axes = [1, 2]>")),
        normed(norm(mean="ReduceSum")),
        normed(norm(square="s = Pow(x, one)")),
        normed(norm(square="o = Neg(x) s = Mul(x, o)")),
        normed(norm(division="i = Div(two, r) n = Mul(x, i)")),
        normed(norm(division="o = Neg(x) n = Div(o, r)")),
        normed(norm(division="n = Div(r, x)")),
        normed(norm(total="m, m")),
        normed(norm(scaling="n, two")),
        normed(norm(scaling="n, x")),
        normed(norm(), "(float[2,3,8] x) => (float[2,3,8] y, float[2,3,1] m)"),
        normed(f"{norm()} z = Neg(n)", "(float[2,3,8] x) => (float[2,3,8] y, float[2,3,8] z)"),
        normed(norm(), "(double[2,3,8] x) => (double[2,3,8] y)"),
        normed(norm(mean="ReduceMean<axes = [-1], keepdims = 0>"),
               "(float[8,8] x) => (float[8,8] y)"),
        normed(norm(), "(float[rows,8] x) => (float[rows,8] y)"),
    ],
    ids=["other axis", "two axes", "sum", "cube", "another factor", "not the reciprocal",
         "another dividend", "upside down", "no epsilon", "scalar weight", "computed weight",
         "mean is an output", "other reader", "double", "mean along the rows", "dynamic shape"],
)  # fmt: skip
def test_what_is_no_rms_norm_stays(model: onnx.ModelProto) -> None:
    assert op_types(simplified(model)) == op_types(model)


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (f"x = Add(p, q) {norm()}", ["Add", FUSED]),
        (f"x = Sub(p, p) {norm()}", ["Sub", FUSED]),
    ],
    ids=["broadcast", "no sum"],
)
def test_what_is_no_residual_sum_stays_before_the_norm(lines: str, kept: list[str]) -> None:
    assert op_types(simplified(normed(lines, SUM))) == kept


def test_of_two_norms_of_a_sum_one_takes_it_in() -> None:
    model = written(
        """(float[3,8] p, float[3,8] q) => (float[3,8] y, float[3,8] z) {
            x = Add(p, q) y = RMSNormalization(x, gamma) z = RMSNormalization(x, beta)
        }""",
        23,
        gamma=weight(8),
        beta=weight(8) + 1,
    )
    changed = simplified(model)
    assert sorted(op_types(changed)) == ["RMSNormalization", SKIP]
    assert_equivalent(changed, model)


@pytest.mark.parametrize("product", ["Mul(y, half)", "Mul(half, y)"])
@pytest.mark.parametrize("before", ["x = Add(p, q)", "x = Neg(p)"])
def test_a_number_goes_into_the_weight(product: str, before: str) -> None:
    model = written(
        f"(float[3,8] p, float[3,8] q) => (float[3,8] z) {{ {before} {norm()} z = {product} }}",
        half=np.array([0.5], np.float32),
        **CONSTANTS,
    )
    changed = simplified(model)
    assert op_types(changed) == ([SKIP] if "Add" in before else ["Neg", FUSED])
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    ("scaling", "results"),
    [
        ("z = Mul(y, gamma)", "float[3,8] z"),
        ("z = Mul(x, half)", "float[3,8] z, float[3,8] y"),
        ("z = Mul(y, half)", "float[3,8] z, float[3,8] y"),
        ("z = Mul(y, half) w = Neg(y)", "float[3,8] z, float[3,8] w"),
        ("z = Mul(y, deep)", "float[1,3,8] z"),
    ],
    ids=["no number", "the sum", "output", "other reader", "another shape"],
)
def test_a_product_that_is_not_only_of_the_norm_stays(scaling: str, results: str) -> None:
    model = written(
        f"(float[3,8] p, float[3,8] q) => ({results}) {{ x = Add(p, q) {norm()} {scaling} }}",
        half=np.array(0.5, np.float32),
        deep=np.full((1, 1, 1), 0.5, np.float32),
        **CONSTANTS,
    )
    changed = simplified(model)
    assert op_types(changed)[:2] == [SKIP, "Mul"]
    assert_equivalent(changed, model)
