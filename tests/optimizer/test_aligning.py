"""Channels that are added are 0: the same results, from convolutions of other sizes."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched import aligning
from onnxsched.aligning import find_passages
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.rewriting import possible_rewrites, rewritten
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import feeds_for, reference
from support.nets import Net
from support.optimizing import assert_close
from support.strategies import GPU

NHWC = Variant("nhwc", fuse_conv_bias=True)
SIZE = 5


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels come in groups of 4 here, so that models are small."""
    monkeypatch.setattr(aligning, "_GROUP", 4)


def new_net() -> Net:
    return Net((2, 3, SIZE, SIZE))


@st.composite
def nets(draw: DrawFn) -> Model:
    net = new_net()
    for _ in range(draw(st.integers(1, 10))):
        x = draw(st.sampled_from(list(net.shapes)))
        kind = draw(st.sampled_from(["conv", "conv", "conv", "depthwise", "alone", "pool", "add"]))
        if kind == "conv":
            net.conv(
                x, draw(st.integers(1, 9)), draw(st.sampled_from([1, 3])), bias=draw(st.booleans())
            )
        elif kind == "depthwise":
            net.conv(x, net.shapes[x][1], 3, group=net.shapes[x][1])
        elif kind == "alone":
            net.add(draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softplus"])), x)
        elif kind == "pool":
            op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            net.add(op, x, kernel_shape=[3, 3], pads=[1] * 4)
        else:
            net.add("Add", x, draw(st.sampled_from(net.alike(x))))
    outputs = draw(st.sets(st.sampled_from(list(net.shapes)[1:]), max_size=2))
    return net.model(*sorted(outputs))


@given(nets())
@settings(deadline=None, max_examples=100)
def test_results_stay_what_they_were(model: Model) -> None:
    feeds = feeds_for(model.proto, seed=1)
    expected = reference(model.proto, feeds)
    result = rewritten(model, "aligned")
    onnx.checker.check_model(result.proto, full_check=True)
    assert_close(reference(result.proto, feeds), expected)
    assert result.proto == rewritten(model, "aligned").proto
    assert result.proto.graph.output == model.proto.graph.output
    view = GraphView(result)
    assert not find_passages(view)
    assert all(view.readers.get(weight) for weight in view.weights if weight not in feeds)


def counts(model: Model) -> list[tuple[str, int]]:
    return [
        (passage.first.name, passage.channel_count) for passage in find_passages(GraphView(model))
    ]


def test_channels_are_added_between_convolutions() -> None:
    net = new_net()
    relu = net.add(
        "Relu", net.add("MaxPool", net.conv("x", 3, 3), kernel_shape=[3, 3], pads=[1] * 4)
    )
    both = net.conv(relu, 8), net.conv(relu, 6, 3)
    model = net.model(*both)
    assert counts(model) == [("nt0", 4)]
    result = rewritten(model, "aligned")
    shapes = {name: kind.shape for name, kind in result.tensors.items()}
    assert shapes["t2/aligned"] == (2, 4, SIZE, SIZE)
    view = GraphView(result)
    dims = [
        tuple(view.weights[node.input[1]].dims)
        for node in result.proto.graph.node
        if node.op_type == "Conv"
    ]
    assert dims == [(4, 3, 3, 3), (8, 4, 1, 1), (6, 4, 3, 3)]


def left_alone(change: str) -> Model:
    net = new_net()
    first = net.conv("x", 4 if change == "aligned" else 1 if change == "narrow" else 3, 3)
    between = net.add("Relu", first)
    if change == "added":
        between = net.add("Add", between, first)
    second = net.conv(between, 3, 3, group=3) if change == "depthwise" else net.conv(between, 8)
    return net.model(*([between] if change == "seen" else []), second)


@pytest.mark.parametrize("change", ["aligned", "narrow", "added", "depthwise", "seen"])
def test_other_channels_are_left_alone(change: str) -> None:
    model = left_alone(change)
    assert counts(model) == []
    assert "aligned" not in possible_rewrites(model, GPU, NHWC).alike


def test_large_convolutions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = new_net()
    model = net.model(net.conv(net.conv("x", 3), 8))
    flops = 2 * 2 * SIZE * SIZE * 4 * 8
    monkeypatch.setattr(aligning, "_MOST_FLOPS", flops)
    assert counts(model) == [("nt0", 4)]
    monkeypatch.setattr(aligning, "_MOST_FLOPS", flops - 1)
    assert counts(model) == []


def test_only_channels_last_have_fast_kernels_for_them() -> None:
    net = new_net()
    model = net.model(net.conv(net.conv("x", 3), 8))
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT).alike == ()
    assert possible_rewrites(model, GPU, NHWC).alike == ("aligned",)
