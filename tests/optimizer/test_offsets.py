"""Biases that wait: the same results from fewer kernels."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched import offsets
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.offsets import deferred, find_deferrals
from onnxsched.rewriting import possible_rewrites, rewritten
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import feeds_for, reference, weight
from support.nets import Net
from support.optimizing import as_it_is, assert_close, parsed
from support.simplifying import written
from support.strategies import GPU

CHANNELS = 2


def new_net(size: int, batch: int = 1) -> Net:
    return Net((batch, CHANNELS, size, size))


def conv(net: Net, x: str, kernel: int, *, depthwise: bool = False, bias: bool = True) -> str:
    return net.conv(x, CHANNELS, kernel, CHANNELS if depthwise else 1, bias)


def kernels(model: Model) -> int:
    """As many as a GPU launches where convolutions don't add their biases."""
    nodes = list(model.proto.graph.node)
    return len(nodes) + len([n for n in nodes if n.op_type == "Conv" and len(n.input) == 3])


def check(model: Model) -> Model:
    """The model with late biases, which computes the same with no more kernels."""
    result = deferred(model)
    feeds = feeds_for(model.proto, seed=1)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
    onnx.checker.check_model(result.proto, full_check=True)
    assert kernels(result) <= kernels(model)
    assert result.proto == deferred(model).proto
    return result


@st.composite
def nets(draw: DrawFn) -> Model:
    net = new_net(draw(st.integers(3, 6)), draw(st.sampled_from([1, 1, 1, 2])))
    for _ in range(draw(st.integers(1, 14))):
        x = draw(st.sampled_from(list(net.shapes)))
        same = net.alike(x)
        kinds = ["conv", "conv", "conv", "relu", "relu", "add", "add", "other"]
        kind = draw(st.sampled_from(kinds))
        if kind == "conv":
            kernel = draw(st.sampled_from([1, 1, 3]))
            conv(net, x, kernel, depthwise=draw(st.booleans()), bias=draw(st.booleans()))
        elif kind == "relu":
            net.add("Relu", x)
        elif kind == "add":
            net.add("Add", x, draw(st.sampled_from(same)))
        else:
            _other(draw, net, x)
    return net.model(draw(st.sampled_from(list(net.shapes)[1:])))


def _other(draw: DrawFn, net: Net, x: str) -> None:
    """A pool, a product, a strided convolution, or what no offset passes."""
    size = net.shapes[x][2]
    op = draw(st.sampled_from(["MaxPool", "AveragePool", "Mul", "Sigmoid", "stride", "auto"]))
    if op in ("MaxPool", "AveragePool"):
        counted = {"count_include_pad": draw(st.integers(0, 1))} if op == "AveragePool" else {}
        net.add(op, x, kernel_shape=[3, 3], pads=[1] * 4, **counted)
    elif op == "Mul":
        net.add("Mul", x, net.store(*draw(st.sampled_from([(), (1,), (CHANNELS, 1, 1)]))))
    elif op == "Sigmoid":
        net.add("Sigmoid", x)
    else:
        weights = [net.store(CHANNELS, CHANNELS, 3, 3), net.store(CHANNELS)]
        half = (size + 1) // 2
        if op == "auto":
            net.add("Conv", x, *weights, size=half, strides=[2, 2], auto_pad="SAME_UPPER")
        else:
            net.add("Conv", x, *weights, size=half, strides=[2, 2], pads=[1] * 4)


@settings(max_examples=150)
@given(nets())
def test_late_biases_change_no_result_and_add_no_kernel(model: Model) -> None:
    check(model)


def separable(net: Net, x: str) -> str:
    for _ in range(2):
        x = conv(net, conv(net, net.add("Relu", x), 3, depthwise=True, bias=False), 1)
    return x


def test_a_cell_of_separable_convolutions_has_no_kernel_for_biases() -> None:
    net = new_net(6)
    start = conv(net, "x", 1)
    end = net.add("Add", separable(net, start), separable(net, start))
    model = net.model(net.add("Sigmoid", end))
    result = check(model)
    assert kernels(model) - kernels(result) == 4  # the first bias would pass two Relus
    assert [n.op_type for n in result.proto.graph.node].count("Sum") == 1


def test_adds_of_adds_are_one_sum() -> None:
    net = new_net(4)
    total = conv(net, "x", 1)
    for _ in range(4):
        total = net.add("Add", total, conv(net, "x", 1))
    result = check(net.model(net.add("Relu", total)))
    sums = [node for node in result.proto.graph.node if node.op_type in ("Add", "Sum")]
    assert [len(node.input) for node in sums] == [6]


@pytest.mark.parametrize("bias", [True, False])
def test_no_sum_reads_more_than_eight_with_its_stored_offset(bias: bool) -> None:
    lengths = set()
    for count in range(2, 20):
        net = new_net(1)
        total = conv(net, "x", 1, bias=bias)
        for _ in range(1, count):
            total = net.add("Add", total, conv(net, "x", 1, bias=bias))
        result = check(net.model(net.add("Relu", total)))
        sums = [node for node in result.proto.graph.node if node.op_type == "Sum"]
        lengths |= {len(node.input) for node in sums}
    assert max(lengths) == (8 if bias else 7)


def test_an_unpadded_convolution_adds_what_came_before_with_its_own_bias() -> None:
    net = new_net(4)
    model = net.model(net.add("Sigmoid", conv(net, net.add("Relu", conv(net, "x", 1)), 1)))
    result = check(model)
    assert kernels(model) - kernels(result) == 1
    assert [len(n.input) for n in result.proto.graph.node if n.op_type == "Conv"] == [2, 3]


def test_what_is_stored_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    net = new_net(6)
    first, second = (net.add("Add", conv(net, "x", 1), conv(net, "x", 1)) for _ in range(2))
    model = net.model(net.add("Relu", first), net.add("Relu", second))
    assert len(find_deferrals(GraphView(model))[1]) == 4
    monkeypatch.setattr(offsets, "_LEAST_ROOM_NBYTES", 4 * CHANNELS * 36)
    monkeypatch.setattr(offsets, "_ROOM_SHARE", 0)
    assert len(find_deferrals(GraphView(model))[1]) == 2
    check(model)


def test_only_variants_whose_biases_are_kernels_let_them_wait() -> None:
    net = new_net(6)
    model = net.model(net.add("Relu", net.add("Add", conv(net, "x", 3), conv(net, "x", 1))))
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT).merged[0] == "late-bias"
    fused = Variant("nhwc", fuse_conv_bias=True)
    assert "late-bias" not in possible_rewrites(model, GPU, fused).merged
    assert rewritten(model, "late-bias").rewrite == "late-bias"
    assert rewritten(model, "late-bias").proto == deferred(model).proto


def test_adds_of_whole_numbers_stay() -> None:
    model = as_it_is(
        parsed(
            "(int32[1, 2, 3, 3] x, int32[1, 2, 3, 3] z) => (int32[1, 2, 3, 3] y) "
            "{ a = Add(x, z)  b = Add(a, x)  y = Add(b, z) }"
        )
    )
    assert [node.op_type for node in deferred(model).proto.graph.node] == ["Add"] * 3


def test_the_first_bias_of_a_convolution_is_what_came_before() -> None:
    net = new_net(1)
    waiting = conv(net, conv(net, "x", 1), 3, bias=False)
    total = net.add("Add", conv(net, waiting, 1, bias=False), "x")
    check(net.model(total))


def test_a_window_in_padding_averages_no_bias() -> None:
    model = as_it_is(
        written(
            """(float[1,2,2,2] x, float[1,3,1,1] z) => (float[1,3,1,1] y) {
                a = Conv(x, w, b)
                p = AveragePool<kernel_shape = [2,2], dilations = [3,3], pads = [1,1,1,1]>(a)
                y = Add(p, z)
            }""",
            19,
            w=weight(3, 2, 1, 1),
            b=weight(3),
        )
    )
    assert find_deferrals(GraphView(model))[1] == ()


@pytest.mark.parametrize("kind", ["Conv", "Relu", "MaxPool"])
def test_long_chains_are_no_deep_ones(kind: str) -> None:
    net = new_net(1)
    x = conv(net, "x", 1)
    for _ in range(600):
        if kind == "Conv":
            x = conv(net, x, 3, bias=False)
        elif kind == "Relu":
            x = net.add(kind, x)
        else:
            x = net.add(kind, x, kernel_shape=[1, 1])
    _, waiting = find_deferrals(GraphView(net.model(net.add("Add", x, "x"))))
    assert len(waiting) == 1
