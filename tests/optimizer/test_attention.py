"""Attention without the biases of its keys and values computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from support.models import Array, weight
from support.simplifying import assert_equivalent, op_counts, simplified, written

BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 4
FEATURES = HEADS * WIDTH


def weights(batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Array]:
    matrices = {f"w{role}": weight(FEATURES, FEATURES) / 4 for role in "qkvo"}
    biases = {f"b{role}": weight(FEATURES) + place for place, role in enumerate("qkvo")}
    shapes = {
        "split": np.array([batch, tokens, HEADS, WIDTH]),
        "merged": np.array([batch, tokens, FEATURES]),
        "flat": np.array([batch, HEADS, tokens**2]),
        "square": np.array([batch, HEADS, tokens, tokens]),
        "gamma": weight(FEATURES) + 1,
        "beta": weight(FEATURES),
        "inverse": weight(WIDTH, WIDTH),
    }
    return {**matrices, **biases, **shapes}


def heads(role: str, perm: str = "0, 2, 1, 3") -> str:
    return (
        f"{role}1 = MatMul(x, w{role}) {role}2 = Add({role}1, b{role}) "
        f"{role}3 = Reshape({role}2, split) {role}4 = Transpose<perm = [{perm}]>({role}3) "
    )


MASKED = ("Add(s1, mask)", "Add(mask, s1)")
SCORES = "s1 = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(q4, k4) s2 = Add(s1, mask) "
SOFTMAX = "p = Softmax<axis = -1>(s2) "
CONTEXT = (
    "c1 = MatMul(p, v4) c2 = Transpose<perm = [0, 2, 1, 3]>(c1) c3 = Reshape(c2, merged) "
    "o1 = MatMul(c3, wo) "
)
OUTPUT = "y = Add(o1, bo) "
SKIP = "y = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(o1, x, gamma, beta, bo) "


def attention(
    keys: str = heads("k"),
    values: str = heads("v"),
    scores: str = SCORES,
    softmax: str = SOFTMAX,
    context: str = CONTEXT,
    output: str = OUTPUT,
    results: str = "",
    batch: int = BATCH,
    tokens: int = TOKENS,
) -> onnx.ModelProto:
    kind = f"float[{batch},{tokens},{FEATURES}]"
    square = f"float[{batch},{HEADS},{tokens},{tokens}]"
    declared = f"{square} s0, {square} s1, float[{batch},{HEADS},{tokens},{WIDTH}] c1"
    return written(
        f"({kind} x, float[{batch},1,1,{tokens}] mask) => ({kind} y{results}) <{declared}> "
        f"{{ {heads('q')} {keys} {values} {scores} {softmax} {context} {output} }}",
        **weights(batch, tokens),
    )


@st.composite
def attentions(draw: DrawFn) -> onnx.ModelProto:
    """Attention as exporters and ONNX Runtime write it."""
    turned = draw(st.booleans())
    multiply = "MatMul" if turned else "com.microsoft.FusedMatMul<transB = 1>"
    return attention(
        keys=heads("k", "0, 2, 3, 1" if turned else "0, 2, 1, 3"),
        scores=f"s1 = {multiply}(q4, k4) s2 = {draw(st.sampled_from(MASKED))} ",
        softmax=f"p = Softmax<axis = {draw(st.sampled_from([-1, 3]))}>(s2) ",
        output=draw(st.sampled_from([OUTPUT, SKIP, "y = Add(bo, o1) "])),
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, 5)),
    )


@given(attentions())
@settings(max_examples=40, deadline=None)
def test_only_the_bias_of_the_queries_is_added_apart(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    adds = [node for node in changed.graph.node if node.op_type == "Add"]
    assert len(adds) == op_counts(model)["Add"] - 2
    assert not {"bk", "bv", "bo"} & {weight.name for weight in changed.graph.initializer}
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    ("model", "gone"),
    [
        (attention(scores=SCORES.replace("s1 =", "s0 =") + "s1 = Mul(s0, s0) "), {"bv"}),
        (attention(softmax="p = Softmax<axis = 2>(s2) "), set()),
        (attention(softmax="p = Sigmoid(s2) "), set()),
        (attention(softmax="s3 = Reshape(s2, flat) p0 = Softmax<axis = -1>(s3) "
                   "p = Reshape(p0, square) "), set()),
        (attention(results=f", float[{BATCH},{TOKENS},{FEATURES}] k2"), {"bv"}),
        (attention(results=f", float[{BATCH},{HEADS},{TOKENS},{WIDTH}] v4"), {"bk"}),
        (attention(results=f", float[{BATCH},{HEADS},{TOKENS},{TOKENS}] s1"), {"bv"}),
        (attention(results=f", float[{BATCH},{HEADS},{TOKENS},{TOKENS}] p"), {"bk", "bv"}),
        (attention(output="y = Relu(o1) "), {"bk"}),
        (attention(output=f"{OUTPUT} z = Abs(o1) ",
                   results=f", float[{BATCH},{TOKENS},{FEATURES}] z"), {"bk"}),
        (attention(context=CONTEXT.replace("MatMul(p, v4)", "MatMul(p, v5)"),
                   values=f"{heads('v')} v5 = MatMul(v4, inverse) "), {"bk"}),
        (attention(context="c1 = com.microsoft.FusedMatMul<alpha = 2.0>(p, v4) "
                   + CONTEXT.partition(") ")[2]), {"bk"}),
        (attention(context="c1 = com.microsoft.FusedMatMul<transA = 1>(p, v4) "
                   + CONTEXT.partition(") ")[2]), {"bk"}),
    ],
    ids=["squared scores", "another axis", "sigmoid", "over all scores", "keys are an output",
         "values are an output",
         "scores are an output", "weights are an output", "no bias to join", "other reader",
         "values multiplied again", "scaled", "transposed"],
)  # fmt: skip
def test_a_bias_goes_only_where_it_changes_nothing(model: onnx.ModelProto, gone: set[str]) -> None:
    changed = simplified(model)
    left = {weight.name for weight in changed.graph.initializer}
    assert {"bk", "bv"} - left == gone
    assert "bq" in left
    assert_equivalent(changed, model, 1e-4)


@pytest.mark.parametrize(
    "text",
    [
        """(float[2,4] x, float[3,2] q) => (float[3,4] y) {
            k1 = MatMul(x, w) k2 = Add(k1, b) s = MatMul(q, k2) y = Softmax<axis = -1>(s)
        }""",
        """(float[2,4] x, float[3,4] q) => (float[3,4] y) {
            v1 = MatMul(x, w) v2 = Add(v1, b) v3 = Transpose<perm = [1, 0]>(v2)
            p = Softmax<axis = -1>(q) c = MatMul(p, v3) o = MatMul(c, u) y = Add(o, b)
        }""",
    ],
    ids=["along the scores", "along the sum"],
)
def test_a_bias_along_what_softmax_sums_over_stays(text: str) -> None:
    model = written(text, w=weight(4, 4), b=weight(4), u=weight(2, 4))
    assert op_counts(simplified(model)) == op_counts(model)


def test_a_bias_that_is_added_twice_stays() -> None:
    model = written(
        """(float[1,2,3,3] q, float[1,2,3,4] v0) => (float[1,3,8] y) {
            p = Softmax<axis = -1>(q)
            v = Add(v0, vb)
            c = MatMul(p, v)
            t = Transpose<perm = [0,2,1,3]>(c)
            e = Reshape(t, sh)
            o = MatMul(e, ow)
            y = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(o, o, g, be, ob)
        }""",
        vb=weight(4), sh=np.array([1, 3, 8]), ow=weight(8, 8), g=weight(8), be=weight(8),
        ob=weight(8),
    )  # fmt: skip
    assert_equivalent(simplified(model), model)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_weights_of_a_single_query_may_have_one_axis(batch: tuple[int, ...]) -> None:
    rows, results = (",".join(map(str, (*batch, *size))) for size in ((TOKENS, WIDTH), (WIDTH,)))
    model = written(
        f"""(float[{TOKENS}] s, float[{rows}] x) => (float[{results}] y) {{
            p = Softmax<axis = -1>(s)
            r = Relu(x)
            v = Add(r, bias)
            c = MatMul(p, v)
            o = MatMul(c, inverse)
            y = Add(o, bias)
        }}""",
        bias=weight(WIDTH),
        inverse=weight(WIDTH, WIDTH),
    )
    assert_equivalent(simplified(model), model)
