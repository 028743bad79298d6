"""Pools count zeros around their image themselves, and convolutions leave pixels out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import helper, numpy_helper

from sample_models import build
from support.simplifying import (
    assert_equivalent,
    image_model,
    op_counts,
    op_types,
    simplified,
    written,
)


def constants(**values: Any) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


@st.composite
def padded_pools(draw: DrawFn) -> onnx.ModelProto:
    """A Pad, and pools of what it writes, after a Relu or not."""
    kernel = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    pads = [draw(st.integers(0, size - 1)) for size in (*kernel, *kernel)]
    amounts = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]])
    step = draw(st.integers(1, 2))
    rectifies = draw(st.booleans())
    op_types = draw(st.lists(st.sampled_from(["AveragePool", "MaxPool"]), min_size=1, max_size=3))
    nodes = [helper.make_node("Relu", ["x"], ["r"], "relu")] * rectifies
    nodes.append(helper.make_node("Pad", ["r" if rectifies else "x", "amounts"], ["p"], "pad"))
    names = [f"y{number}" for number in range(len(op_types))]
    nodes += [
        helper.make_node(op_type, ["p"], [name], name, kernel_shape=kernel, strides=[step, step])
        for op_type, name in zip(op_types, names, strict=True)
    ]
    shape = (2, 3, draw(st.integers(3, 7)), draw(st.integers(3, 7)))
    return image_model(nodes, shape, constants(amounts=amounts), names)


@given(padded_pools())
@settings(max_examples=150, deadline=None)
def test_pools_pad_themselves(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    assert "Pad" not in op_types(changed)
    assert_equivalent(changed, model)


PADDED = "p = Pad(x, pads)"
AVERAGE = "y = AveragePool<kernel_shape = [3, 3]>(p)"


@pytest.mark.parametrize(
    ("body", "pads", "outputs"),
    [
        (f"{PADDED} {AVERAGE}", [0, 1, 1, 1, 0, 0, 1, 1], ""),
        (f"{PADDED} {AVERAGE}", [0, 0, 3, 3, 0, 0, 3, 3], ""),
        (f"{PADDED} {AVERAGE}", [0, 0, -1, 1, 0, 0, 1, 1], ""),
        (f"p = Pad(x, pads, one) {AVERAGE}", [0, 0, 1, 1, 0, 0, 1, 1], ""),
        (f'p = Pad<mode = "edge">(x, pads) {AVERAGE}', [0, 0, 1, 1, 0, 0, 1, 1], ""),
        (f"{PADDED} z = Neg(p) {AVERAGE}", [0, 0, 1, 1, 0, 0, 1, 1], ", float[n,c,h,w] z"),
        (f"{PADDED} {AVERAGE}", [0, 0, 1, 1, 0, 0, 1, 1], ", float[n,c,h,w] p"),
        (
            f"{PADDED} y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(p)",
            [0, 0, 1, 1, 0, 0, 1, 1],
            "",
        ),
        (
            f"{PADDED} y = AveragePool<kernel_shape = [3, 3], ceil_mode = 1>(p)",
            [0, 0, 1, 1, 0, 0, 1, 1],
            "",
        ),
        (
            f'{PADDED} y = AveragePool<kernel_shape = [3, 3], auto_pad = "VALID">(p)',
            [0, 0, 1, 1, 0, 0, 1, 1],
            "",
        ),
    ],
    ids=[
        "channels", "wide", "crop", "ones", "edge", "read", "output", "padded twice", "ceil",
        "unwritten pads",
    ],
)  # fmt: skip
def test_what_a_pool_can_not_take_over_stays(body: str, pads: list[int], outputs: str) -> None:
    text = f"(float[1,2,6,6] x) => (float[n,c,h,w] y{outputs}) {{ {body} }}"
    model = written(text, pads=np.array(pads), one=np.array(1, np.float32))
    changed = simplified(model)
    assert op_types(changed) == op_types(model)


@st.composite
def moved_pools(draw: DrawFn) -> onnx.ModelProto:
    """One of every few pixels of an image that may be moved, and a convolution of them."""
    step, begin = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    pads = draw(st.integers(0, begin))
    op_type = draw(st.sampled_from(["AveragePool", "MaxPool"]))
    weights = constants(
        w=np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    )
    nodes, last = [], "x"
    if pads:
        nodes.append(helper.make_node("Pad", [last, "amounts"], ["p"], "pad"))
        weights += constants(amounts=np.array([0, 0, 0, 0, 0, 0, pads, pads]))
        last = "p"
    if draw(st.booleans()):
        nodes.append(helper.make_node("Slice", [last, "starts", "ends", "axes"], ["s"], "slice"))
        axes = draw(st.sampled_from([[2, 3], [3, 2], [-2, -1]]))
        weights += constants(starts=np.array([begin] * 2), ends=np.array([2**31 - 1] * 2))
        weights += constants(axes=np.array(axes))
        last = "s"
    nodes.append(
        helper.make_node(op_type, [last], ["t"], "pool", kernel_shape=[1, 1], strides=[step, step])
    )
    nodes.append(helper.make_node("Conv", ["t", "w"], ["y"], "conv"))
    shape = (2, 3, draw(st.integers(4, 8)), draw(st.integers(4, 8)))
    return image_model(nodes, shape, weights, ["y"])


@given(moved_pools())
@settings(max_examples=150, deadline=None)
def test_convolutions_leave_pixels_out_themselves(model: onnx.ModelProto) -> None:
    assert_equivalent(simplified(model), model)


def test_only_the_pixels_that_are_taken_are_moved() -> None:
    model = written(
        """(float[1,2,5,6] x) => (float[n,c,h,w] y) {
            p = Pad(x, pads) s = Slice(p, starts, ends, axes)
            t = AveragePool<kernel_shape = [1, 1], strides = [2, 2]>(s) y = Conv(t, w)
        }""",
        pads=np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        starts=np.array([1, 1]),
        ends=np.array([99, 99]),
        axes=np.array([2, 3]),
        w=np.ones((3, 2, 1, 1), np.float32),
    )
    changed = simplified(model)
    assert op_types(changed) == ["Slice", "Conv"]
    [pads] = [found.ints for found in changed.graph.node[1].attribute if found.name == "pads"]
    assert list(pads) == [0, 0, 1, 0]
    assert_equivalent(changed, model)


def test_a_convolution_that_leaves_its_pads_unwritten_stays() -> None:
    model = written(
        """(float[1,2,5,6] x) => (float[n,c,h,w] y) {
            t = MaxPool<kernel_shape = [1, 1], strides = [2, 2]>(x)
            y = Conv<auto_pad = "VALID">(t, w)
        }""",
        w=np.ones((3, 2, 1, 1), np.float32),
    )
    assert op_types(simplified(model)) == op_types(model)


def test_nasnet_pads_nothing() -> None:
    model = build("nasnet_mobile", image=64)
    changed = simplified(model)
    before, after = op_counts(model), op_counts(changed)
    assert before["Pad"] == 8
    assert "Pad" not in after
    assert before["AveragePool"] - after["AveragePool"] == 8
    assert_equivalent(changed, model)


@pytest.mark.parametrize("strides", [[1, 2], [2, 2]])
def test_a_window_may_be_larger_than_the_padded_image(strides: list[int]) -> None:
    pads = numpy_helper.from_array(np.array([0, 0, 2, 1, 0, 0, 1, 0]), "pads")
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["a"]),
        helper.make_node("AveragePool", ["a"], ["y"], kernel_shape=[3, 3], strides=strides),
        helper.make_node("AveragePool", ["a"], ["z"], kernel_shape=[3, 2]),
    ]
    changed = simplified(image_model(nodes, (1, 2, 8, 1), [pads], ["y", "z"]))
    assert [n.op_type for n in changed.graph.node if "y" in n.output] == ["AveragePool"]
    assert op_counts(changed)["Pad"] == 1


def test_steps_are_no_axes() -> None:
    model = written(
        """(float[1,1,9,9] x) => (float[1,3,h,w] y) {
            s = Slice(x, starts, ends, "", steps)
            p = MaxPool<kernel_shape = [1,1], strides = [2,2]>(s)
            y = Conv(p, u)
        }""",
        starts=np.array([0, 0, 0, 1]),
        ends=np.array([99] * 4),
        steps=np.array([1, 1, 2, 2]),
        u=np.ones((3, 1, 1, 1), np.float32),
    )
    assert_equivalent(simplified(model), model)
