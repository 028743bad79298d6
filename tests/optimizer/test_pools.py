"""An average of fewer channels computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import helper, numpy_helper

from support.optimizing import parsed
from support.simplifying import assert_equivalent, image_model, op_types, simplified


def model_of(
    pool: dict[str, Any],
    conv: dict[str, Any],
    sizes: tuple[int, int, int],
    has_bias: bool,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """A pool, and a convolution of what it writes: of so many channels to so many, on so wide."""
    channels, filters, width = sizes
    random = np.random.default_rng(0)
    weight = random.standard_normal((filters, channels, *conv.pop("kernel", (1, 1)))) / 4
    bias = random.standard_normal(filters)
    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], name="pool", **pool),
        helper.make_node("Conv", ["p", "w", *(["b"] * has_bias)], ["y"], name="conv", **conv),
    ]
    weights = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    weights += [numpy_helper.from_array(bias.astype(np.float32), "b")] * has_bias
    return image_model(nodes, (2, channels, 6, width), weights, outputs, opset=20)


@st.composite
def pools(draw: DrawFn) -> onnx.ModelProto:
    kernel = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2).filter(lambda k: max(k) > 1))
    pads = [draw(st.integers(0, size - 1)) for size in (*kernel, *kernel)]
    pool: dict[str, Any] = {"kernel_shape": kernel, "pads": pads}
    pool["count_include_pad"] = draw(st.integers(0, 1))
    sizes = (draw(st.integers(3, 6)), draw(st.integers(1, 2)), draw(st.integers(4, 7)))
    return model_of(pool, {}, sizes, draw(st.booleans()))


@given(pools())
@settings(max_examples=100, deadline=None)
def test_the_average_of_fewer_channels_computes_the_same(model: onnx.ModelProto) -> None:
    changed = simplified(model)
    assert op_types(changed) == ["Conv", "AveragePool"]
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    ("pool", "conv", "sizes", "outputs"),
    [
        ({"strides": [2, 2]}, {}, (4, 2, 6), ("y",)),
        ({"ceil_mode": 1}, {}, (4, 2, 6), ("y",)),
        ({"dilations": [2, 2]}, {}, (4, 2, 6), ("y",)),
        ({"auto_pad": "SAME_UPPER"}, {}, (4, 2, 6), ("y",)),
        ({}, {"strides": [2, 2]}, (4, 2, 6), ("y",)),
        ({}, {"pads": [1, 1, 1, 1]}, (4, 2, 6), ("y",)),
        ({}, {"auto_pad": "VALID"}, (4, 2, 6), ("y",)),
        ({}, {"kernel": (3, 3)}, (4, 2, 6), ("y",)),
        ({}, {}, (2, 2, 6), ("y",)),
        ({}, {}, (4, 2, 6), ("y", "p")),
    ],
    ids=[
        "strides", "ceil", "dilations", "unwritten pads", "conv strides", "conv pads",
        "unwritten conv pads", "3x3",
        "as many channels", "an output",
    ],
)  # fmt: skip
def test_other_pools_stay_before_the_convolution(
    pool: dict[str, Any],
    conv: dict[str, Any],
    sizes: tuple[int, int, int],
    outputs: tuple[str, ...],
) -> None:
    model = model_of({"kernel_shape": [2, 2], **pool}, dict(conv), sizes, True, outputs)
    assert op_types(simplified(model)) == ["AveragePool", "Conv"]


def test_a_module_of_inception_averages_what_its_branch_writes() -> None:
    model = parsed(
        """(float[1,6,4,4] x) => (float[1,4,4,4] y) {
            a = Conv(x, v)
            ra = Relu(a)
            p = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)
            b = Conv(p, w)
            rb = Relu(b)
            y = Concat<axis = 1>(ra, rb)
        }""",
        v=np.ones((2, 6, 1, 1), np.float32),
        w=np.ones((2, 6, 1, 1), np.float32),
    )
    assert op_types(simplified(model)) == ["Conv", "Conv", "AveragePool", "Concat", "Relu"]
