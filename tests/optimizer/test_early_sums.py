"""Convolutions of Concats in two parts compute what they did, and the Concat is not waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, numpy_helper

import onnxsched
from onnxsched import scheduling
from onnxsched.decision import Decision, decide
from onnxsched.early_sums import find_early_sums
from onnxsched.loading import Model
from onnxsched.outcomes import Outcome
from onnxsched.rewriting import possible_early_sums, rewritten
from onnxsched.siblings import GraphView
from onnxsched.variants import possible_variants
from onnxsched_runtime.fusing import fused, fused_nodes
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import feeds_for, reference
from support.nets import Net
from support.optimizing import as_it_is, assert_close, plain_outputs, saved
from support.strategies import GPU

FUSED = Variant("nhwc", fuse_conv_bias=True, fuses=True)
SIZE = 5


def new_net() -> Net:
    return Net((2, 3, SIZE, SIZE))


def branch(net: Net, x: str, steps: int, count: int = 2) -> str:
    """So many convolutions, one after another."""
    for _ in range(steps):
        x = net.conv(x, count, 3)
    return x


def concat(net: Net, *parts: str, axis: int = 1) -> str:
    count = sum(net.shapes[part][1] for part in parts)
    return net.add("Concat", *parts, count=count, axis=axis)


@st.composite
def modules(draw: DrawFn) -> Model:
    """Inception-like modules, each of which reads the one before."""
    net = new_net()
    x = "x"
    for _ in range(draw(st.integers(1, 3))):
        parts = []
        for steps in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
            part = branch(net, x, steps, draw(st.integers(1, 3)))
            if draw(st.integers(0, 3)) == 0:
                part = net.add("MaxPool", part, kernel_shape=[3, 3], pads=[1] * 4)
            parts.append(net.add("Relu", part) if draw(st.integers(0, 3)) == 0 else part)
        x = concat(net, *parts, axis=draw(st.sampled_from([1, -3])))
        x = net.add("Relu", x) if draw(st.booleans()) else x
        if draw(st.booleans()):
            net.add(draw(st.sampled_from(["Relu", "Neg", "Abs"])), x)
        if draw(st.booleans()):
            net.conv(x, 2, draw(st.sampled_from([1, 3])), bias=draw(st.booleans()))
    net.conv(x, 2, draw(st.sampled_from([1, 3])), bias=draw(st.booleans()))
    outputs = draw(st.sets(st.sampled_from(list(net.shapes)[1:]), max_size=2))
    return net.model(*sorted(outputs))


def checked(model: Model) -> Model:
    """The model with early sums, checked against the model as it was."""
    before, feeds = model.proto.SerializeToString(), feeds_for(model.proto, seed=1)
    result = rewritten(model, "early-sums")
    assert model.proto.SerializeToString() == before
    onnx.checker.check_model(result.proto, full_check=True)
    tolerance = 1e-4 if all(k.element_type != TensorProto.FLOAT16 for k in kinds(model)) else 1e-2
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds), tolerance)
    assert result.rewrite == "early-sums"
    assert result.proto == rewritten(model, "early-sums").proto
    assert result.proto.graph.output == model.proto.graph.output
    names = [node.name for node in result.proto.graph.node]
    assert len(set(names)) == len(names)
    view = GraphView(result)
    flowing = {name for node in result.proto.graph.node for name in node.output} | feeds.keys()
    assert result.tensors.keys() == flowing
    inferred = as_it_is(result.proto).tensors
    assert {name: inferred[name] for name in flowing} == dict(result.tensors)
    assert all(view.readers.get(weight) for weight in view.weights)
    assert all(view.readers.get(name) or name in view.outputs for name in flowing - feeds.keys())
    return result


def kinds(model: Model) -> list[TensorType]:
    return list(model.tensors.values())


def places(model: Model) -> list[tuple[str, int, str]]:
    """Where there are early sums: the Concat, which of its inputs is late, and the convolution."""
    found = find_early_sums(GraphView(model))
    return [(place.concat.name, place.late, place.reader.name) for place in found]


def op_types(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.proto.graph.node)


@given(modules())
@settings(deadline=None, max_examples=100)
def test_results_stay_what_they_were(model: Model) -> None:
    result = checked(model)
    count = len(places(model))
    assert op_types(result)["Add"] == count
    assert op_types(result)["Conv"] == op_types(model)["Conv"] + count


def module(
    steps: Sequence[int] = (1, 3, 2), *, rectified: bool = False, kernel: int = 3
) -> tuple[Net, str]:
    """Branches of so many convolutions, what joins them, and a convolution of that."""
    net = new_net()
    x = concat(net, *(branch(net, "x", step, 1 + i) for i, step in enumerate(steps)))
    x = net.add("Relu", x) if rectified else x
    net.conv(x, 4, kernel)
    return net, x


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("steps", [*permutations((1, 2, 3))])
def test_the_late_branch_may_be_any(steps: Sequence[int], rectified: bool) -> None:
    net, _ = module(steps, rectified=rectified)
    model = net.model()
    assert places(model) == [("nt6", steps.index(3), "nt8" if rectified else "nt7")]
    result = checked(model)
    [add] = [node for node in result.proto.graph.node if node.op_type == "Add"]
    view = GraphView(result)
    late, early = (view.writer[name] for name in add.input)
    assert (len(late.input), len(early.input)) == (3, 2)
    assert view.weights[late.input[1]].dims[1] == 1 + steps.index(3)
    assert op_types(result)["Concat"] == 1, "that of all branches is gone"
    assert op_types(result)["Relu"] == (3 if rectified else 0)


def test_one_early_branch_needs_no_concat() -> None:
    result = checked(module((3, 1), rectified=True)[0].model())
    assert "Concat" not in op_types(result)


def test_nothing_waits_for_branches_that_end_alike() -> None:
    for steps in [(3, 1, 3), (2, 2), (0, 0)]:
        model = module(steps)[0].model()
        assert places(model) == []
        assert rewritten(model, "early-sums").proto.graph.node == model.proto.graph.node


def test_copies_and_views_are_not_counted() -> None:
    net = new_net()
    for _ in range(3):
        net.add("Relu", [*net.shapes][-1])
    model = net.model(net.conv(concat(net, net.conv("x", 2), [*net.shapes][-2]), 2))
    assert [late for _, late, _ in places(model)] == [0]
    checked(model)


@pytest.mark.parametrize("higher", ["pool", "conv", "none"])
def test_only_what_the_longest_way_goes_on_with_is_cut(higher: str) -> None:
    net, x = module()
    if higher == "pool":
        net.conv(net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), 2)
    elif higher == "conv":
        net.conv(net.conv(x, 2), 2)
    else:
        net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)
    model = net.model()
    expected = {"pool": [], "conv": [("nt6", 1, "nt8")], "none": [("nt6", 1, "nt7")]}
    assert places(model) == expected[higher]
    assert op_types(checked(model))["Concat"] == (1 if higher == "pool" else 2)


@pytest.mark.parametrize("rectified", [False, True])
def test_a_concat_that_the_caller_sees_stays(rectified: bool) -> None:
    net, x = module(rectified=rectified)
    result = checked(net.model(x))
    writer = GraphView(result).writer[x]
    assert (writer.op_type, len(writer.input)) == ("Concat", 3)


def test_a_rectified_concat_that_is_seen_before_it_is_stays_as_it_is() -> None:
    net, _ = module(rectified=True)
    assert places(net.model("t6")) == []


def test_what_is_not_negative_is_not_rectified_again() -> None:
    net = new_net()
    start = net.add("Relu", net.conv("x", 3))
    pool = net.add("MaxPool", start, kernel_shape=[3, 3], pads=[1] * 4)
    joined = net.add("Relu", concat(net, pool, branch(net, start, 2), net.conv(start, 2)))
    result = checked(net.model(joined, net.conv(joined, 3)))
    assert op_types(result)["Relu"] == 1 + 2


def test_a_weight_that_another_reads_stays() -> None:
    net, x = module()
    conv = net.nodes[-1]
    net.add("Conv", x, *conv.input[1:], count=4, pads=[1] * 4)
    result = checked(net.model())
    weights = GraphView(result).weights
    name = conv.input[1]
    assert {name, f"{name}/early", f"{name}/late"} <= weights.keys()


LEFT_ALONE = {
    "another axis": {"axis": 2},
    "groups": {"group": 7},
    "a weight that is computed": {"computed": True},
    "a stored part": {"stored": True},
}


@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_convolutions_and_concats_are_left_alone(change: dict[str, Any]) -> None:
    net = new_net()
    parts = [branch(net, "x", 1, 7), branch(net, "x", 2, 7)]
    if change.get("stored"):
        name = net.store(2, 7, SIZE, SIZE)
        net.shapes[name] = (2, 7, SIZE, SIZE)
        joined = concat(net, name, *parts)
        del net.shapes[name]
    elif change.get("axis"):
        joined = net.add("Concat", *parts, axis=2)
        net.shapes[joined] = (2, 7, 2 * SIZE, SIZE)
    else:
        joined = concat(net, *parts)
    net.conv(joined, 7, group=change.get("group", 1))
    if change.get("computed"):
        weight = net.nodes[-1].input[1]
        net.nodes.insert(0, onnx.helper.make_node("Neg", [weight], ["negated"], "negation"))
        net.nodes[-1].input[1] = "negated"
    model = net.model()
    assert places(model) == []
    checked(model)


def test_half_precision_stays_half() -> None:
    proto = module(rectified=True)[0].model().proto
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for weight in proto.graph.initializer:
        half = numpy_helper.to_array(weight).astype("float16")
        weight.CopyFrom(numpy_helper.from_array(half, weight.name))
    model = as_it_is(proto)
    assert len(places(model)) == 1
    result = checked(model)
    assert {kind.element_type for kind in kinds(result)} == {TensorProto.FLOAT16}


def channels_last(model: Model) -> ModelSource:
    """What a GPU would lower a model to, but for how its sessions would have it transposed."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        if node.op_type in ("Conv", "MaxPool"):
            node.domain = "com.ms.internal.nhwc"
        for attribute in node.attribute:
            attribute.i = 3 if attribute.name == "axis" else attribute.i
    tensors = {}
    for name, kind in model.tensors.items():
        images, channels, *sizes = kind.shape or ()
        tensors[name] = replace(kind, shape=(images, *sizes, channels))
    return ModelSource(proto, tensors, FUSED, is_lowered=True)


@pytest.mark.parametrize("others", [False, True])
def test_the_late_convolution_takes_in_sum_and_relu(others: bool) -> None:
    """Beside Concats there is nothing left but convolutions, all of them rectified."""
    net, x = module(rectified=True)
    net.add("Relu", [*net.shapes][-1])
    if others:
        net.add("Relu", net.conv(x, 2))
    for model, added in ((net.model(), False), (rewritten(net.model(), "early-sums"), True)):
        source = fused(channels_last(model))
        assert {node.op_type for node in source.model.graph.node} == {"Conv", "Concat"}
        last = next(node for node in fused_nodes(source).values() if node.output == "t9")
        assert (last.what.adds, last.what.has_bias, last.what.is_rectified) == (added, True, True)
        assert source.model.graph.node[-1].op_type == "Conv"


def test_only_what_launches_convolutions_with_their_sums_has_them() -> None:
    model = module()[0].model()
    for variant in (DEFAULT_VARIANT, *possible_variants(model, GPU)):
        assert possible_early_sums(model, variant) == ("early-sums",) * variant.fuses
    assert possible_early_sums(module((1, 1))[0].model(), FUSED) == ()
    on_host = replace(model, host_reasons={model.proto.graph.node[0].name: "planted"})
    assert possible_early_sums(on_host, FUSED) == ()


@pytest.fixture
def fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU have a variant that fuses, and early sums be chosen, whichever is faster."""

    def chosen(outcomes: Sequence[Outcome], *rest: Any) -> Decision:
        ranked = sorted(outcomes, key=lambda o: (not o.samples_us, "sums" not in o.form[1]))
        return decide(ranked, *rest)

    monkeypatch.setattr(scheduling, "possible_variants", lambda *_: (DEFAULT_VARIANT, FUSED))
    monkeypatch.setattr(
        scheduling,
        "promising",
        lambda raced: [o for o in raced.variants if o.model.variant == FUSED],
    )
    monkeypatch.setattr(scheduling, "decide", chosen)


def optimized(source: Path, target: Path, **options: Any) -> onnxsched.OptimizeResult:
    defaults: dict[str, Any] = {"device": "cpu", "streams": 2, "cache_dir": None}
    return onnxsched.optimize(source, target, **defaults | options)


def test_they_are_scheduled_beside_the_best_form_written_and_recalled(
    fusing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module(rectified=True)[0].model()
    source = saved(model.proto, tmp_path)
    target, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    options = {"cache_dir": tmp_path / "cache"}
    result = optimized(source, target, **options)
    assert {entry["rewrite"] for entry in result.alternatives} == {"none", "early-sums"}
    assert result.rewrite == "early-sums"
    assert all(difference.is_within for difference in result.differences)
    feeds = feeds_for(model.proto)
    with onnxsched.load(target) as session:
        assert_close(session.run(None, feeds), plain_outputs(source, feeds))
    monkeypatch.delattr(scheduling, "tune")
    assert optimized(source, again, **options).from_cache
    assert again.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("options", [{"variants": False}, {"device": "cpu:0,cpu:1"}])
def test_there_are_none_where_they_are_not_asked_for(
    options: dict[str, Any], fusing: None, tmp_path: Path
) -> None:
    source = saved(module()[0].model().proto, tmp_path)
    result = optimized(source, tmp_path / "out.onnx", **options)
    assert not any("sums" in entry["rewrite"] for entry in result.alternatives)
