"""Channels that are added are 0: the same results, from convolutions of other sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, helper, numpy_helper

from onnxsched import aligning
from onnxsched.aligning import find_passages
from onnxsched.loading import Model
from onnxsched.rewriting import possible_rewrites, rewritten
from onnxsched.siblings import GraphView
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import feeds_for, reference
from support.optimizing import as_it_is, assert_close
from support.strategies import GPU

NHWC = Variant("nhwc", fuse_conv_bias=True)
SIZE = 5


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels come in groups of 4 here, so that models are small."""
    monkeypatch.setattr(aligning, "_GROUP", 4)


@dataclass
class Net:
    """An image model that grows operator by operator; images keep their size."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    channels: dict[str, int] = field(default_factory=lambda: {"x": 3})
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def store(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        array = self.rng.uniform(-1, 1, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, count: int | None = None, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{name}", **attributes))
        self.channels[name] = self.channels[inputs[0]] if count is None else count
        return name

    def conv(self, x: str, count: int, kernel: int = 1, group: int = 1, bias: bool = True) -> str:
        inputs = [x, self.store(count, self.channels[x] // group, kernel, kernel)]
        inputs += [self.store(count)] if bias else []
        return self.add("Conv", *inputs, count=count, pads=[kernel // 2] * 4, group=group)

    def model(self, *outputs: str) -> Model:
        def value(name: str) -> onnx.ValueInfoProto:
            shape = (2, self.channels[name], SIZE, SIZE)
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        read = {name for node in self.nodes for name in node.input}
        ends = [name for name in self.channels if name not in read and name != "x"]
        graph = helper.make_graph(
            self.nodes, "net", [value("x")],
            [value(name) for name in dict.fromkeys([*outputs, *ends])], self.weights,
            value_info=[value(name) for name in self.channels if name != "x"],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17)]
        return as_it_is(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@st.composite
def nets(draw: DrawFn) -> Model:
    net = Net()
    for _ in range(draw(st.integers(1, 10))):
        x = draw(st.sampled_from(list(net.channels)))
        kind = draw(st.sampled_from(["conv", "conv", "conv", "depthwise", "alone", "pool", "add"]))
        if kind == "conv":
            net.conv(
                x, draw(st.integers(1, 9)), draw(st.sampled_from([1, 3])), bias=draw(st.booleans())
            )
        elif kind == "depthwise":
            net.conv(x, net.channels[x], 3, group=net.channels[x])
        elif kind == "alone":
            net.add(draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softplus"])), x)
        elif kind == "pool":
            op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            net.add(op, x, kernel_shape=[3, 3], pads=[1] * 4)
        else:
            same = [name for name, count in net.channels.items() if count == net.channels[x]]
            net.add("Add", x, draw(st.sampled_from(same)))
    outputs = draw(st.sets(st.sampled_from(list(net.channels)[1:]), max_size=2))
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
    net = Net()
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
    net = Net()
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
    net = Net()
    model = net.model(net.conv(net.conv("x", 3), 8))
    flops = 2 * 2 * SIZE * SIZE * 4 * 8
    monkeypatch.setattr(aligning, "_MOST_FLOPS", flops)
    assert counts(model) == [("nt0", 4)]
    monkeypatch.setattr(aligning, "_MOST_FLOPS", flops - 1)
    assert counts(model) == []


def test_only_channels_last_have_fast_kernels_for_them() -> None:
    net = Net()
    model = net.model(net.conv(net.conv("x", 3), 8))
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT).alike == ()
    assert possible_rewrites(model, GPU, NHWC).alike == ("aligned",)
