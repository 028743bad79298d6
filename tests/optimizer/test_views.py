"""What only changes the shape of a tensor is a Reshape at most, which copies nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from support.simplifying import assert_equivalent, op_counts, op_types, simplified, written


def shape_text(shape: tuple[int, ...] | list[int]) -> str:
    return f"float[{','.join(map(str, shape))}]"


@st.composite
def transposes(draw: DrawFn) -> tuple[list[int], list[int]]:
    """A shape with many sizes of 1, and an order of its axes."""
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=5))
    return shape, draw(st.permutations(range(len(shape))))


@given(transposes())
@settings(max_examples=60, deadline=None)
def test_a_transpose_becomes_a_view_just_if_it_moves_no_number(
    drawn: tuple[list[int], list[int]],
) -> None:
    shape, order = drawn
    result = [shape[axis] for axis in order]
    model = written(
        f"({shape_text(shape)} x) => ({shape_text(result)} y) "
        f"{{ a = Neg(x) b = Transpose<perm = {list(order)}>(a) y = Neg(b) }}"
    )
    numbers = np.arange(np.prod(shape)).reshape(shape)
    stays = np.array_equal(numbers.transpose(order).ravel(), numbers.ravel())
    changed = simplified(model)
    middle = [] if shape == result else ["Reshape"]
    assert op_types(changed) == ["Neg", *(middle if stays else ["Transpose"]), "Neg"]
    assert_equivalent(changed, model)


@st.composite
def chains_of_views(draw: DrawFn) -> onnx.ModelProto:
    """Views of views, of which some are outputs or read by another operator too."""
    shapes = [[2, 3, 4], [6, 4], [24], [1, 2, 12], [2, 3, 4, 1]]
    lines, weights, outputs = ["t0 = Neg(x)"], {}, []
    for number in range(1, draw(st.integers(2, 6))):
        shape = draw(st.sampled_from(shapes))
        weights[f"s{number}"] = np.array(shape)
        lines.append(f"t{number} = Reshape(t{number - 1}, s{number})")
        use = draw(st.sampled_from(["nothing", "nothing", "output", "reader"]))
        if use == "output":
            outputs.append(f"{shape_text(shape)} t{number}")
        if use == "reader":
            lines.append(f"u{number} = Abs(t{number})")
            outputs.append(f"{shape_text(shape)} u{number}")
    lines.append(f"y = Neg(t{number})")
    outputs.append(f"{shape_text(shape)} y")
    return written(
        f"(float[2,3,4] x) => ({', '.join(outputs)}) {{ {' '.join(lines)} }}", **weights
    )


@given(chains_of_views())
@settings(max_examples=60, deadline=None)
def test_every_tensor_is_one_view_away_from_what_computes_it(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    assert_equivalent(changed, model)
    views = [node for node in changed.graph.node if node.op_type == "Reshape"]
    assert not {node.input[0] for node in views} & {node.output[0] for node in views}
    assert op_counts(changed)["Reshape"] <= op_counts(model)["Reshape"]


def test_views_of_all_kinds_are_one() -> None:
    model = written(
        """(float[2,1,3] x) => (float[6] y) {
            a = Neg(x) b = Squeeze(a, one) c = Unsqueeze(b, zero)
            d = Flatten<axis = 2>(c) e = Reshape(d, all) y = Neg(e)
        }""",
        one=np.array([1]),
        zero=np.array([0]),
        all=np.array([-1]),
    )
    changed = simplified(model)
    assert op_types(changed) == ["Neg", "Reshape", "Neg"]
    assert len(changed.graph.initializer) == 1
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "(float[2,3] x) => (float[2,3] y) { y = Reshape(x, shape) }",
            ["Reshape"],
        ),
        (
            """(float[2,3] x, bool flag) => (float[2,3] y) {
                a = Neg(x) b = Reshape(a, shape)
                y = If(flag) <
                    then_branch = yes () => (float[2,3] u) { u = Abs(b) },
                    else_branch = no () => (float[2,3] v) { v = Exp(b) }
                >
            }""",
            ["Neg", "Reshape", "If"],
        ),
        (
            "(float[rows,1,3] x) => (float[1,rows,3] y) { y = Transpose<perm = [1, 0, 2]>(x) }",
            ["Transpose"],
        ),
        (
            "(float[0,1,3] x) => (float[1,0,3] y) { y = Transpose<perm = [1, 0, 2]>(x) }",
            ["Transpose"],
        ),
    ],
    ids=["from input to output", "read by a subgraph", "dynamic shape", "nothing in it"],
)
def test_what_must_stay_stays(text: str, expected: list[str]) -> None:
    assert op_types(simplified(written(text, shape=np.array([2, 3])))) == expected


def test_a_transpose_that_is_an_output_becomes_one_view() -> None:
    model = written("(float[1,4,3] x) => (float[4,1,3] y) { y = Transpose<perm = [1, 0, 2]>(x) }")
    changed = simplified(model)
    assert op_types(changed) == ["Reshape"]
    assert_equivalent(changed, model)


def test_axes_are_reversed_where_no_order_is_given() -> None:
    model = written("(float[1,4,1] x) => (float[1,4,1] y) { a = Transpose(x) y = Neg(a) }")
    changed = simplified(model)
    assert op_types(changed) == ["Neg"]
    assert_equivalent(changed, model)


def test_a_view_that_a_body_captures_stays() -> None:
    model = written(
        """(int64 count, float[2,3] x) => (float[2,3] y) {
            step = Relu(x)
            f = Flatten<axis = 1>(step)
            true = Constant<value = bool {1}>()
            s = Loop(count, true, f) <
                body = body (int64 i, bool go, float[2,3] before)
                    => (bool on, float[2,3] after) {
                    on = Identity(go)
                    after = Add(before, f)
                } >
            y = Neg(s)
        }"""
    )
    assert "Flatten" in op_types(simplified(model))
