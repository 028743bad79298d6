"""Convolutions take in what follows them, and the model computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import TensorProto, numpy_helper

from onnxsched_runtime.fused import channels_last, fused_node, fused_nodes, weight_array
from onnxsched_runtime.fusing import fused
from onnxsched_runtime.kernels import FusedConvolution
from onnxsched_runtime.model import is_fused, node_reads
from onnxsched_runtime.source import ModelSource
from support.fused import NHWC_DOMAIN, Lowered, evaluated, feeds_for, lowered_models


def writers(source: ModelSource) -> dict[str, onnx.NodeProto]:
    return {tensor: node for node in source.model.graph.node for tensor in node.output}


def read_counts(source: ModelSource) -> Counter[str]:
    """How many nodes read each tensor, and the caller if it is an output."""
    graph = source.model.graph
    found = Counter(tensor for node in graph.node for tensor in set(node_reads(node)))
    found.update(value.name for value in graph.output)
    return found


def depth_of(source: ModelSource, tensor: str) -> int:
    """How many operators that take time of their own are on the longest way to a tensor."""
    node = writers(source).get(tensor)
    if node is None:
        return 0
    own = node.op_type not in ("Concat", "Relu", "Transpose", "Reshape")
    return own + max(depth_of(source, read) for read in node_reads(node))


def kinds_of(source: ModelSource) -> list[str]:
    """The operators of a model; `Fused` is a convolution of ours."""
    return ["Fused" if is_fused(node) else node.op_type for node in source.model.graph.node]


@settings(deadline=None)
@given(source=lowered_models())
def test_a_fused_model_computes_the_same(source: ModelSource) -> None:
    before = source.model.SerializeToString()
    feeds = feeds_for(source)
    after = fused(source)
    expected, actual = evaluated(source, feeds), evaluated(after, feeds)
    assert list(after.model.graph.output) == list(source.model.graph.output)
    for value in source.model.graph.output:
        np.testing.assert_array_equal(actual[value.name], expected[value.name])
    assert source.model.SerializeToString() == before


@settings(deadline=None)
@given(source=lowered_models())
def test_nodes_keep_their_names_and_become_no_more(source: ModelSource) -> None:
    names = [node.name for node in fused(source).model.graph.node]
    assert len(set(names)) == len(names)
    assert set(names) <= {node.name for node in source.model.graph.node}


@settings(deadline=None)
@given(source=lowered_models())
def test_every_tensor_that_is_left_has_its_type(source: ModelSource) -> None:
    after = fused(source)
    values = evaluated(after, feeds_for(after))
    flowing = {tensor for tensor in values if not after.is_weight(tensor)}
    assert after.tensors.keys() == flowing
    assert all(after.tensors[tensor].shape == values[tensor].shape for tensor in flowing)


@settings(deadline=None)
@given(source=lowered_models())
def test_every_convolution_is_fused(source: ModelSource) -> None:
    wanted = {node.name for node in source.model.graph.node if node.op_type == "Conv"}
    assert fused_nodes(fused(source)).keys() == wanted


@settings(deadline=None)
@given(source=lowered_models())
def test_no_relu_is_left_behind_a_convolution_that_nothing_else_reads(
    source: ModelSource,
) -> None:
    after = fused(source)
    writer, count = writers(after), read_counts(after)
    for node in after.model.graph.node:
        if node.op_type == "Relu" and node.input[0] in writer:
            assert not is_fused(writer[node.input[0]]) or count[node.input[0]] > 1


@settings(deadline=None)
@given(source=lowered_models())
def test_a_sum_is_taken_in_where_the_other_summand_is_there_before(source: ModelSource) -> None:
    before = {node.name: node for node in source.model.graph.node}
    for name, node in fused_nodes(fused(source)).items():
        if node.added is not None:
            own = before[name].output[0]
            assert depth_of(source, node.added) < depth_of(source, own)
            assert source.tensors[node.added] == source.tensors[own]
    writer, count = writers(source), read_counts(source)
    left = {node.name for node in fused(source).model.graph.node}
    for add in (n for n in before.values() if n.op_type == "Add" and n.name in left):
        for one, other in (add.input, reversed(add.input)):
            conv = writer.get(one)
            if conv is not None and conv.op_type == "Conv" and count[one] == 1:
                is_alike = source.tensors[one] == source.tensors[other]
                is_early = depth_of(source, other) < depth_of(source, one)
                assert not is_alike or not is_early


@settings(deadline=None)
@given(source=lowered_models())
def test_a_fused_node_is_described_as_onnx_would(source: ModelSource) -> None:
    after = fused(source)
    values = evaluated(after, feeds_for(after))
    nodes = {node.name: node for node in after.model.graph.node if is_fused(node)}
    for name, found in fused_nodes(after).items():
        assert fused_node(nodes[name], after) == found
        what = found.what
        assert isinstance(what, FusedConvolution)
        assert found.filters is not None
        for shape, tensor in ((what.image, found.image), (what.output, found.output)):
            assert shape == np.moveaxis(values[tensor], -1, 1).shape
        assert what.filters == values[found.filters].shape
        assert what.filters[0] == what.output[1]
        assert what.image[1] % what.filters[1] == 0
        assert (what.has_bias, what.adds) == (found.bias is not None, found.added is not None)
        assert {found.image, *filter(None, [found.added])} == {
            tensor for tensor in node_reads(nodes[name]) if not after.is_weight(tensor)
        }
        assert not what.is_rectified or values[found.output].min() >= 0


def test_a_long_way_to_a_relu_is_no_hindrance() -> None:
    net = image()
    last = net.conv("x", 2)
    for _ in range(1500):
        last = net.reshape(last, 1, 4, 4, 2)
    after = fused(net.source(net.add("Relu", [last])))
    assert "Relu" not in kinds_of(after)


def image() -> Lowered:
    return Lowered((1, 4, 4, 2))


def chain(net: Lowered) -> str:
    return net.add("Relu", [net.conv("x", 3, 3)])


def early_sum(net: Lowered) -> str:
    return net.add("Relu", [net.add("Add", [net.conv(net.conv("x", 3), 2), "x"])])


def early_sum_turned(net: Lowered) -> str:
    return net.add("Add", ["x", net.conv("x", 2)])


def sum_of_equals(net: Lowered) -> str:
    return net.add("Add", [net.conv("x", 2), net.conv("x", 2)])


def sum_launched_late(net: Lowered) -> str:
    """Its other summand comes later in the model, but needs less before it."""
    deep = net.conv(net.conv("x", 2), 2)
    return net.add("Add", [deep, net.conv("x", 2)])


def sum_of_a_view(net: Lowered) -> str:
    return net.add("Add", [net.conv("x", 2), net.reshape(net.add("Relu", ["x"]), 1, 4, 4, 2)])


def sum_of_a_weight(net: Lowered) -> str:
    return net.add("Add", [net.conv("x", 2), net.store(1, 4, 4, 2)])


def sum_of_one_channel(net: Lowered) -> str:
    return net.add("Add", [net.conv(net.conv("x", 2), 2), net.conv("x", 1)])


def double(net: Lowered) -> str:
    conv = net.conv("x", 2)
    return net.add("Add", [conv, conv])


def inception(net: Lowered) -> str:
    pooled = net.pool(net.conv("x", 2))
    rectified = net.add("Relu", [net.conv("x", 2)])
    return net.add("Relu", [net.add("Concat", [net.conv("x", 1), pooled, rectified], axis=3)])


def inception_of_a_stranger(net: Lowered) -> str:
    return net.add("Relu", [net.add("Concat", [net.conv("x", 1), "x"], axis=3)])


def inception_by_another_operator(net: Lowered) -> str:
    joined = net.add("Concat", [net.conv("x", 1), "x"], axis=3)
    net.nodes[-1].domain = "not.onnx"
    return net.add("Relu", [joined])


def inception_of_strangers(net: Lowered) -> str:
    other = net.add("MatMul", ["x", net.store(2, 2)])
    return net.add("Relu", [net.add("Concat", [net.conv("x", 1), "x", other], axis=3)])


def pooled(net: Lowered) -> str:
    return net.add("Relu", [net.pool(net.conv("x", 2))])


def pooled_apart(net: Lowered) -> str:
    """A window may see padding alone, of which a pool makes the lowest number there is."""
    pool = {"kernel_shape": [2, 2], "dilations": [4, 4], "pads": [2, 2, 2, 2]}
    return net.add("Relu", [net.add("MaxPool", [net.conv("x", 2)], NHWC_DOMAIN, **pool)])


def flat(net: Lowered) -> str:
    turned = net.add("Transpose", [net.conv("x", 2)], perm=[0, 3, 1, 2])
    return net.add("Relu", [net.reshape(turned, 1, 32)])


def twice(net: Lowered) -> str:
    return net.add("Relu", [net.add("Relu", [net.conv("x", 2)])])


def grouped(net: Lowered) -> str:
    return net.add("Relu", [net.conv("x", 2, group=2)])


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (chain, ["Fused"]),
        (early_sum, ["Fused", "Fused"]),
        (early_sum_turned, ["Fused"]),
        (sum_of_equals, ["Fused", "Fused", "Add"]),
        (sum_launched_late, ["Fused", "Fused", "Fused"]),
        (sum_of_a_view, ["Relu", "Reshape", "Fused"]),
        (sum_of_a_weight, ["Fused", "Add"]),
        (sum_of_one_channel, ["Fused", "Fused", "Fused", "Add"]),
        (double, ["Fused", "Add"]),
        (inception, ["Fused", "MaxPool", "Fused", "Fused", "Concat"]),
        (inception_of_a_stranger, ["Fused", "Relu", "Concat"]),
        (inception_by_another_operator, ["Fused", "Concat", "Relu"]),
        (inception_of_strangers, ["MatMul", "Fused", "Concat", "Relu"]),
        (pooled, ["Fused", "MaxPool"]),
        (pooled_apart, ["Fused", "MaxPool", "Relu"]),
        (flat, ["Fused", "Transpose", "Reshape"]),
        (twice, ["Fused"]),
        (grouped, ["Fused"]),
    ],
)
def test_what_is_taken_in(build: Callable[[Lowered], str], kinds: list[str]) -> None:
    net = image()
    assert kinds_of(fused(net.source(build(net)))) == kinds


@pytest.mark.parametrize("build", [chain, early_sum, pooled])
def test_what_something_else_reads_stays_as_it_is(build: Callable[[Lowered], str]) -> None:
    net = image()
    output = build(net)
    (between,) = net.nodes[-1].input
    after = fused(net.source(output, between))
    assert kinds_of(after)[-1] == "Relu"
    assert between in after.tensors


def test_an_output_that_is_read_twice_stays_as_it_is() -> None:
    net = image()
    conv = net.conv("x", 2)
    total = net.add("Add", [conv, "x"])
    after = fused(net.source(total, net.add("Relu", [conv]), conv))
    assert kinds_of(after) == ["Fused", "Add", "Relu"]


def test_a_convolution_that_pads_by_itself_is_left_to_sessions() -> None:
    net = image()
    source = net.source(net.conv("x", 2))
    (conv,) = source.model.graph.node
    for name, value in {"auto_pad": "SAME_UPPER", "pads": []}.items():
        (old,) = [a for a in conv.attribute if a.name == name] or [conv.attribute.add()]
        old.CopyFrom(onnx.helper.make_attribute(name, value, attr_type=old.type or None))
    assert kinds_of(fused(source)) == ["Conv"]


@pytest.mark.parametrize(
    ("element_type", "kind"),
    [(TensorProto.FLOAT, "Fused"), (TensorProto.FLOAT16, "Fused"), (TensorProto.DOUBLE, "Conv")],
)
def test_only_two_types_are_fused(element_type: int, kind: str) -> None:
    net = Lowered((1, 4, 4, 2), element_type=element_type)
    after = fused(net.source(net.conv("x", 2)))
    assert kinds_of(after) == [kind]
    assert all(n.what.element_type == element_type for n in fused_nodes(after).values())


def test_filters_that_are_computed_are_left_to_sessions() -> None:
    net = image()
    source = net.source(net.conv("x", 2))
    (conv,) = source.model.graph.node
    (filters, _) = conv.input[1:]
    weights = [w for w in source.model.graph.initializer if w.name != filters]
    kind = source.kind_of(filters)
    del source.model.graph.initializer[:]
    source.model.graph.initializer.extend(weights)
    tensors = {**source.tensors, filters: kind}
    assert kinds_of(fused(replace(source, tensors=tensors))) == ["Conv"]


def test_weights_lie_channels_last_beside_images() -> None:
    net = image()
    after = fused(net.source(net.conv("x", 3, 3)))
    (node,) = fused_nodes(after).values()
    assert node.filters is not None
    stored = numpy_helper.to_array(after.weight(node.filters))
    lies = weight_array(after, node.filters)
    assert lies.flags.c_contiguous
    assert (lies.shape, stored.shape) == ((3, 3, 3, 2), (3, 2, 3, 3))
    for out, (y, x), count in [(2, (0, 1), 1), (0, (2, 2), 0)]:
        assert lies[out, y, x, count] == stored[out, count, y, x]
    np.testing.assert_array_equal(channels_last(stored), lies)
    assert node.bias is not None
    np.testing.assert_array_equal(
        weight_array(after, node.bias), numpy_helper.to_array(after.weight(node.bias))
    )
