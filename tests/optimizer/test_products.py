"""Products read transposed tensors as they lie, where one batch dimension is all there is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from support.simplifying import assert_equivalent, op_counts, op_types, simplified, written

_SIZES = st.integers(2, 4)


def _kind(shape: list[int]) -> str:
    return f"float[{','.join(map(str, shape))}]"


@st.composite
def products(draw: DrawFn) -> onnx.ModelProto:
    """A product of two tensors in any order of their axes, some with leading ones."""
    batch, rows, inner, columns = (draw(_SIZES) for _ in range(4))
    ones = [1] * draw(st.integers(0, 2))
    fused = draw(st.booleans())
    flags, inputs, lines = [], [], []
    for side, shape in (("A", [rows, inner]), ("B", [inner, columns])):
        trans = fused and draw(st.booleans())
        read = [*ones, batch, *(reversed(shape) if trans else shape)]
        order = draw(st.permutations(range(len(read))))
        stored = [0] * len(read)
        for size, axis in zip(read, order, strict=True):
            stored[axis] = size
        inputs.append(f"{_kind(stored)} {side.lower()}")
        lines.append(f"t{side} = Transpose<perm = {list(order)}>({side.lower()})")
        flags.append(f"trans{side} = {int(trans)}")
    result = _kind([*ones, batch, rows, columns])
    name = f"com.microsoft.FusedMatMul<alpha = 0.5, {', '.join(flags)}>" if fused else "MatMul"
    return written(
        f"({', '.join(inputs)}) => ({result} y) {{ {' '.join(lines)} y = {name}(tA, tB) }}"
    )


@given(products())
@settings(max_examples=150, deadline=None)
def test_a_product_computes_the_same_from_what_it_reads_as_it_lies(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    assert op_counts(changed)["Transpose"] <= op_counts(model)["Transpose"]
    assert_equivalent(changed, model)


def test_attention_keeps_one_transpose() -> None:
    model = written(
        """(float[1,5,2,3] q, float[1,6,2,3] k, float[1,6,2,3] v) => (float[1,5,2,3] y) {
            tq = Transpose<perm = [0, 2, 1, 3]>(q)
            tk = Transpose<perm = [0, 2, 3, 1]>(k)
            tv = Transpose<perm = [0, 2, 1, 3]>(v)
            s = MatMul(tq, tk)
            p = Softmax<axis = -1>(s)
            c = MatMul(p, tv)
            y = Transpose<perm = [0, 2, 1, 3]>(c)
        }"""
    )
    changed = simplified(model)
    assert op_counts(changed)["Transpose"] == 1
    assert op_counts(changed)["FusedMatMul"] == 2
    assert_equivalent(changed, model)


@st.composite
def merged_heads(draw: DrawFn) -> tuple[onnx.ModelProto, bool]:
    """Products by head whose results lie side by side for one more; and whether that is so."""
    heads, rows, inner, columns, wide = (draw(_SIZES) for _ in range(5))
    scale = draw(st.sampled_from(["", "h = Mul(c, half)"]))
    order = draw(st.sampled_from([[0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 3, 2]]))
    sizes = [1, heads, rows, columns]
    width = sizes[order[2]] * sizes[order[3]]
    shape = [1, sizes[order[1]], width]
    lines = f"""(float[1,{heads},{rows},{inner}] p, float[1,{inner},{heads},{columns}] v)
        => (float[1,{shape[1]},{wide}] y)
        <float[1] half = {{0.5}}, int64[3] s = {{{",".join(map(str, shape))}}}> {{
            tv = Transpose<perm = [0, 2, 1, 3]>(v)
            c = MatMul(p, tv)
            {scale}
            t = Transpose<perm = {order}>({"h" if scale else "c"})
            r = Reshape(t, s)
            y = MatMul(r, w)
        }}"""
    weight = np.arange(width * wide, dtype=np.float32).reshape(width, wide) % 7 - 3
    return written(lines, w=weight), order == [0, 2, 1, 3] and not scale


@given(merged_heads())
@settings(max_examples=60, deadline=None)
def test_what_heads_write_is_computed_transposed_where_that_merges_them(
    given_model: tuple[onnx.ModelProto, bool],
) -> None:
    model, is_merged = given_model
    changed = simplified(model)
    if is_merged:
        assert op_counts(changed)["Transpose"] == 0
        assert op_counts(changed)["FusedMatMul"] == 2
    else:
        assert op_counts(changed)["MatMul"] == 1
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    "text",
    [
        """(float[2,5,4,3] a, float[2,4,3,6] b) => (float[2,4,5,6] y) {
            t = Transpose<perm = [0, 2, 1, 3]>(a) y = MatMul(t, b)
        }""",
        """(float[5,4,3] a, float[4,3,6] b) => (float[4,5,6] y, float[4,5,3] t) {
            t = Transpose<perm = [1, 0, 2]>(a) y = MatMul(t, b)
        }""",
        """(float[5,4,3] a, float[4,3,6] b) => (float[4,5,6] y, float[4,5,3] z) {
            t = Transpose<perm = [1, 0, 2]>(a) y = MatMul(t, b) z = Neg(t)
        }""",
        """(float[5,4,3] a, float[1,3,6] b) => (float[4,5,6] y) {
            t = Transpose<perm = [1, 0, 2]>(a) y = MatMul(t, b)
        }""",
        """(double[5,4,3] a, double[4,3,6] b) => (double[4,5,6] y) {
            t = Transpose<perm = [1, 0, 2]>(a) y = MatMul(t, b)
        }""",
        """(float[rows,4,3] a, float[4,3,6] b) => (float[4,rows,6] y) {
            t = Transpose<perm = [1, 0, 2]>(a) y = MatMul(t, b)
        }""",
        """(float[3,5,4] a, float[4,3,6] b) => (float[4,5,6] y) {
            t = Transpose<perm = [2, 1, 0]>(a) y = MatMul(t, b)
        }""",
        """(float[5,4,3] a, float[3,4,6] b) => (float[4,5,6] y) {
            t = Transpose<perm = [1, 0, 2]>(a) y = com.microsoft.FusedMatMul<transBatchB = 1>(t, b)
        }""",
    ],
    ids=["two batch dimensions", "output", "other reader", "broadcast", "double", "dynamic shape",
         "no such flag", "flag in use"],
)  # fmt: skip
def test_what_a_product_cannot_take_in_stays(text: str) -> None:
    model = written(text)
    assert op_types(simplified(model)) == op_types(model)
