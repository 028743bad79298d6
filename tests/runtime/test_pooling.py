"""Pools become nodes of our domain where cuDNN can be asked for them, and compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, helper

from onnxsched_runtime.fused import fused_nodes
from onnxsched_runtime.fusing import fused
from onnxsched_runtime.kernels import Pool
from onnxsched_runtime.model import is_fused
from onnxsched_runtime.pooling import pooled
from onnxsched_runtime.source import ModelSource
from support.fused import (
    NHWC_DOMAIN,
    Lowered,
    evaluated,
    feeds_for,
    lowered_models,
    pooled_windows,
)


@st.composite
def pools(draw: DrawFn) -> ModelSource:
    """A model of one pool of any form."""
    window = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = [draw(st.integers(0, window[axis % 2] - 1)) for axis in range(4)]
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    attributes: dict[str, Any] = {"kernel_shape": window, "pads": pads, "strides": strides}
    if op == "AveragePool" and draw(st.booleans()):
        attributes["count_include_pad"] = 1
    net = Lowered((draw(st.integers(1, 2)), draw(st.integers(3, 6)), draw(st.integers(3, 6)), 2))
    return net.source(net.pool("x", op, **attributes))


@settings(deadline=None)
@given(source=pools() | lowered_models())
def test_a_model_computes_the_same(source: ModelSource) -> None:
    before = source.model.SerializeToString()
    feeds = feeds_for(source)
    after = pooled(source)
    expected, actual = evaluated(source, feeds), evaluated(after, feeds)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values)
    assert source.model.SerializeToString() == before


@settings(deadline=None)
@given(source=pools())
def test_a_pool_is_described_as_it_is_computed(source: ModelSource) -> None:
    (before,) = source.model.graph.node
    pads = next(list(a.ints) for a in before.attribute if a.name == "pads")
    nodes = fused_nodes(pooled(source))
    assert bool(nodes) == (before.op_type == "MaxPool" or pads[:2] == pads[2:])
    feeds = feeds_for(source)
    for node in nodes.values():
        what = node.what
        assert isinstance(what, Pool)
        assert (node.filters, node.bias, node.added) == (None, None, None)
        values = evaluated(source, feeds)
        expected = values[node.output]
        assert what.image == tuple(np.moveaxis(values[node.image], -1, 1).shape)
        assert what.output == tuple(np.moveaxis(expected, -1, 1).shape)
        actual = pooled_windows(
            values[node.image], what.window, what.strides, what.pads,
            averages=what.averages, counts_padding=what.counts_padding,
        )  # fmt: skip
        np.testing.assert_array_equal(actual, expected)


@settings(deadline=None)
@given(source=lowered_models())
def test_beside_fused_convolutions_no_pool_is_left_to_sessions(source: ModelSource) -> None:
    after = pooled(fused(source))
    assert {node.op_type for node in after.model.graph.node if node.domain == NHWC_DOMAIN} == set()
    assert [n.name for n in after.model.graph.node] == [
        n.name for n in fused(source).model.graph.node
    ]


def test_padding_that_is_nowhere_makes_no_difference() -> None:
    net = Lowered((1, 4, 4, 2))
    flags = [{}, {"count_include_pad": 1}]
    forms = [net.pool("x", "AveragePool", pads=[0] * 4, **flag) for flag in flags]
    kinds = {node.what for node in fused_nodes(pooled(net.source(*forms))).values()}
    assert len(kinds) == 1


def _left_to_sessions(net: Lowered, **attributes: Any) -> bool:
    source = net.source(net.pool("x", **attributes))
    return not any(map(is_fused, pooled(source).model.graph.node))


@pytest.mark.parametrize(
    "attributes",
    [
        {"op": "AveragePool", "pads": [0, 0, 1, 1]},
        {"dilations": [2, 1], "pads": [0] * 4},
        {"dilations": [2, 1], "pads": [0] * 4, "strides": [2, 2]},  # of as many rows without
        {"kernel_shape": [2, 2], "pads": [2] * 4},
        {"kernel_shape": [2, 2], "pads": [0, 0, 2, 0]},
    ],
)
def test_what_cudnn_may_take_otherwise_is_left_to_sessions(attributes: dict[str, Any]) -> None:
    assert _left_to_sessions(Lowered((1, 6, 6, 2)), **attributes)
    assert not _left_to_sessions(Lowered((1, 6, 6, 2)), dilations=[1, 1])


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_what_a_pool_does_not_say_is_as_onnx_has_it(op: str) -> None:
    net = Lowered((1, 5, 6, 2))
    source = net.source(net.add(op, ["x"], NHWC_DOMAIN, kernel_shape=[3, 2]))
    after, feeds = pooled(source), feeds_for(source)
    (node,) = fused_nodes(after)
    assert node == source.model.graph.node[0].name
    for name, values in evaluated(source, feeds).items():
        np.testing.assert_array_equal(evaluated(after, feeds)[name], values)


def test_a_pool_that_finds_its_padding_itself_is_left_to_sessions() -> None:
    net = Lowered((1, 4, 4, 2))
    source = net.source(net.pool("x", kernel_shape=[2, 2], pads=[1, 1, 0, 0]))
    assert fused_nodes(pooled(source))
    source.model.graph.node[0].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    assert not fused_nodes(pooled(source))


def test_only_two_types_are_pooled_by_us() -> None:
    assert not _left_to_sessions(Lowered((1, 4, 4, 2), element_type=TensorProto.FLOAT16))
    assert _left_to_sessions(Lowered((1, 4, 4, 2), element_type=TensorProto.DOUBLE))


@pytest.mark.parametrize("rounded", [(1, 3, 3, 2), (1, 3, 2, 2), (1, 2, 3, 2)])
def test_rounded_up_sizes_are_left_to_sessions(rounded: tuple[int, ...]) -> None:
    net = Lowered((1, 6, 6, 2))
    result = net.pool("x", kernel_shape=[3, 3], strides=[2, 2], pads=[0] * 4)
    net.shapes[result] = rounded  # as with `ceil_mode`
    assert not fused_nodes(pooled(net.source(result)))


def test_a_pool_that_tells_where_maxima_are_is_left_to_sessions() -> None:
    net = Lowered((1, 4, 4, 2))
    source = net.source(net.pool("x"))
    source.model.graph.node[0].output.append("places")  # integers, whose type is known or not
    assert not fused_nodes(pooled(source))


def test_a_pool_of_another_layout_is_left_to_sessions() -> None:
    net = Lowered((1, 4, 4, 2))
    source = net.source(net.pool("x"))
    source.model.graph.node[0].domain = ""
    assert not fused_nodes(pooled(source))
