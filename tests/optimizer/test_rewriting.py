"""Merged siblings compute what they did, under the same names, and are written as plain ONNX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched import regions
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.recomputing import Duplicate, recompute
from onnxsched.rewriting import (
    MERGES,
    Rewrites,
    possible_bands,
    possible_rewrites,
    rewritten,
    twice,
)
from onnxsched.schedule import Schedule, Slot
from onnxsched.shapes import tensor_types
from onnxsched_runtime.session import optimizing
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from sample_models import build
from support.graphs import durations, linear
from support.models import CPU, MODELS, Array, feeds_for, reference, weight
from support.optimizing import as_it_is, assert_close, loaded, parsed
from support.strategies import DEVICES, GPU

NHWC = Variant("nhwc", fuse_conv_bias=True)
ZOO: dict[str, tuple[dict[str, int], dict[str, dict[str, int]]]] = {
    "googlenet": (
        {"image": 64},
        {
            "merge": {"Conv": -18, "Relu": -9, "Split": 9},
            "merge-inner": {"Conv": -9, "Relu": -9, "Split": 9},
        },
    ),
    "inception_v3": (
        {"image": 75},
        {
            "merge": {"Conv": -19, "Relu": -10, "Split": 10},
            "merge-inner": {"Conv": -10, "Relu": -10, "Split": 10},
            "merge-padded": {"Conv": -23, "Relu": -10, "Split": 10},
        },
    ),
    "squeezenet": ({"image": 48}, {"merge-padded": {"Conv": -8, "Concat": -8}}),
    "nasnet_mobile": (
        {"image": 32},
        {
            "late-bias": {"Relu": -80, "Max": 80, "Add": -52, "Sum": 52},
            "merge+late-bias": {
                "Conv": -11,
                "Split": 11,
                "Relu": -80,
                "Max": 80,
                "Add": -52,
                "Sum": 52,
            },
            "merge": {"Conv": -11, "Split": 11},
        },
    ),
    "randwire": ({"image": 32}, {"late-bias": {"Relu": -17, "Max": 17, "Add": -124, "Sum": 54}}),
    "t5_encoder": (
        {"sequence": 8},
        {
            "transposed": {"MatMul": -10, "FusedMatMul": 10},
            "merge": {"MatMul": -4, "Split": 2},
        },
    ),
    "t5_decoder": (
        {"sequence": 8},
        {
            "transposed": {"MatMul": -16, "FusedMatMul": 16},
            "merge": {"MatMul": -4, "Split": 2},
        },
    ),
    "bert": (
        {"sequence": 8},
        {
            "transposed": {"MatMul": -10, "FusedMatMul": 10},
            "merge": {"MatMul": -4, "Split": 2},
        },
    ),
    "deepfm": ({}, {}),
}
"""Sample models as small as they can be built, and what each rewrite adds and removes."""


@pytest.fixture
def plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models load as for a GPU, where no activation is fused into a convolution."""
    fusions = [*optimizing._UNPORTABLE_FUSIONS, "ConvActivationFusion"]
    monkeypatch.setattr(optimizing, "_UNPORTABLE_FUSIONS", fusions)


def op_types(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.proto.graph.node)


def change(before: Model, after: Model) -> dict[str, int]:
    counts = op_types(after)
    counts.subtract(op_types(before))
    return {name: count for name, count in counts.items() if count}


def assert_well_formed(model: Model) -> None:
    """Every tensor typed, every weight read, every node under a name of its own."""
    graph = model.proto.graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    flowing = {t for node in graph.node for t in node.output if t} | {v.name for v in graph.input}
    assert model.tensors.keys() == flowing
    inferred = tensor_types(model.proto)
    assert {name: inferred[name] for name in model.tensors} == dict(model.tensors)
    assert {w.name for w in graph.initializer} <= {t for node in graph.node for t in node.input}


def tried(model: Model, seed: int = 0) -> dict[str, Model]:
    """The model rewritten in every way, each checked against the model as it was."""
    feeds = feeds_for(model.proto, seed)
    before, expected = model.proto.SerializeToString(), reference(model.proto, feeds)
    found = {}
    for name in MERGES:
        result = rewritten(model, name)
        assert result.rewrite == name
        assert result.proto == rewritten(model, name).proto
        assert_well_formed(result)
        assert_close(reference(result.proto, feeds), expected)
        found[name] = result
    assert model.proto.SerializeToString() == before
    return found


@pytest.mark.usefixtures("plain_convolutions", "shallow_transformers")
@pytest.mark.parametrize("name", ZOO)
def test_sample_models_keep_their_outputs(name: str, tmp_path: Path) -> None:
    sizes, expected = ZOO[name]
    model = loaded(build(name, **sizes), tmp_path)
    found = possible_rewrites(model, GPU, DEFAULT_VARIANT)
    assert (*found.alike, *found.merged) == tuple(expected)
    feeds = feeds_for(model.proto, seed=3)
    outputs = reference(model.proto, feeds)
    for rewrite, changed in expected.items():
        result = rewritten(model, rewrite)
        assert change(model, result) == changed
        assert_well_formed(result)
        assert_close(reference(result.proto, feeds), outputs)
        assert {node.domain for node in result.proto.graph.node} <= {"", "com.microsoft"}


@pytest.mark.usefixtures("plain_convolutions", "shallow_transformers")
@pytest.mark.parametrize(
    ("name", "sizes", "variant", "rewrite", "expected"),
    [
        ("bert", {"sequence": 8}, DEFAULT_VARIANT, "transposed+merge",
         {"MatMul": -10, "FusedMatMul": 6, "Split": 2}),
        ("t5_encoder", {"sequence": 8}, DEFAULT_VARIANT, "transposed+merge",
         {"MatMul": -10, "FusedMatMul": 6, "Split": 2}),
        ("googlenet", {"image": 64}, NHWC, "aligned+merge",
         {"Conv": -18, "Relu": -9, "Split": 9}),
        ("squeezenet", {"image": 48}, NHWC, "aligned+merge-padded",
         {"Conv": -8, "Concat": -8}),
        ("inception_v3", {"image": 75}, NHWC, "aligned", {}),
    ],
)  # fmt: skip
def test_merging_goes_on_top_of_what_leaves_operators_side_by_side(
    name: str,
    sizes: dict[str, int],
    variant: Variant,
    rewrite: str,
    expected: dict[str, int],
    tmp_path: Path,
) -> None:
    model = loaded(build(name, **sizes), tmp_path)
    found = possible_rewrites(model, GPU, variant)
    assert rewrite.startswith(found.alike[0])
    feeds = feeds_for(model.proto, seed=3)
    result = rewritten(model, rewrite)
    assert result.rewrite == rewrite
    assert change(model, result) == expected
    assert_well_formed(result)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))


def test_fused_convolutions_are_merged_too(tmp_path: Path) -> None:
    model = loaded(build("googlenet", image=64), tmp_path)
    assert change(model, tried(model)["merge"]) == {"FusedConv": -18, "Split": 9}


def test_only_a_gpu_and_models_that_are_captured_whole_have_rewrites() -> None:
    model = as_it_is(MODELS["fork_join"]())
    assert possible_rewrites(model, GPU, DEFAULT_VARIANT) == Rewrites(merged=("merge",))
    assert possible_rewrites(model, CPU, DEFAULT_VARIANT) == Rewrites()
    host = as_it_is(model.proto, {model.proto.graph.node[0].name: "for once"})
    assert possible_rewrites(host, GPU, DEFAULT_VARIANT) == Rewrites()
    assert rewritten(model, "none") is model
    for name in ("melt", "melt-2", "bands-2"):
        with pytest.raises(KeyError):
            rewritten(model, name)


def test_several_devices_add_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)
    model = loaded(build("googlenet", image=128), tmp_path)
    assert possible_bands(model, 1) == ()
    names = possible_bands(model, 2)
    assert names == ("bands-2", "bands-half-2", "bands-prefix-2")
    feeds = feeds_for(model.proto)
    for name in names:
        result = rewritten(model, name)
        assert result.rewrite == name
        assert result.proto == rewritten(model, name).proto
        assert_well_formed(result)
        assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
        assert possible_bands(result, 2) == ()


def of_text(text: str, weights: Mapping[str, Array], opset: int = 17) -> Model:
    """The model of a text, with the weights that it reads; its outputs need no shapes there."""
    proto = parsed(text, opset=opset)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name)
        for name, array in weights.items()
        if name in read
    )
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return as_it_is(onnx.shape_inference.infer_shapes(proto, data_prop=True))


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 21])
def test_a_split_says_its_sizes_as_the_opset_wants(opset: int) -> None:
    model = of_text(
        "(float[2,3] x) => (float[2,4] p, float[2,2] q) { p = MatMul(x, a)  q = MatMul(x, b) }",
        {"a": weight(3, 4), "b": weight(3, 2)}, opset,
    )  # fmt: skip
    result = tried(model)["merge"]
    assert [node.op_type for node in result.proto.graph.node] == ["MatMul", "Split"]
    assert [node.name for node in result.proto.graph.node] == ["n0/merged", "p/merged/split"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = Conv(x, u)  b = Conv(x, v)  y = Concat<axis = 1>(a, b)", ["Conv"]),
        ("a = Conv(x, u)  b = Conv(x, v)  y = Concat<axis = -3>(b, a)", ["Conv"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Relu(a)  d = Relu(b)  y = Concat<axis = 1>(c, d)",
         ["Conv", "Relu"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Concat<axis = 1>(a, x, b)  y = Relu(c)",
         ["Conv", "Split", "Concat", "Relu"]),
        ("a = Conv(x, u)  b = Conv(x, v)  y = Concat<axis = 1>(x, a, b)", ["Conv", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  y = Concat<axis = 1>(a, b, a)",
         ["Conv", "Split", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Relu(a)  d = Concat<axis = 1>(c, b)  y = Relu(d)",
         ["Conv", "Relu", "Relu"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Relu(a)  y = Concat<axis = 1>(c, b)",
         ["Conv", "Split", "Relu", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Relu(a)  d = Neg(b)  y = Concat<axis = 1>(c, d)",
         ["Conv", "Split", "Relu", "Neg", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Tanh(a)  d = Sigmoid(b)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Split", "Tanh", "Sigmoid", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Elu<alpha = 0.5>(a)  d = Elu<alpha = 0.25>(b)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Split", "Elu", "Elu", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Sigmoid(a)  d = Add(b, q)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Split", "Sigmoid", "Add", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, w)  y = Concat<axis = 1>(a, b)", ["Conv"]),
        ("a = Conv(x, u)  b = Conv(x, u)  y = Sub(a, b)", ["Conv", "Split", "Sub"]),
        ("a = Conv(x, u)  b = Conv(x, w)  y = Concat<axis = 2>(a, b)",
         ["Conv", "Split", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Add(a, p)  d = Add(q, b)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Add"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Add(a, s)  d = Add(s, b)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Split", "Add", "Add", "Concat"]),
        ("a = Conv(x, u)  b = Conv(x, v)  c = Concat<axis = 1>(a, b)  d = Concat<axis = 1>(x, b)"
         "  y = Concat<axis = 1>(c, d)", ["Conv", "Split", "Concat", "Concat", "Concat"]),
    ],
)  # fmt: skip
def test_pieces_that_one_concat_joins_stay_together(text: str, expected: list[str]) -> None:
    model = of_text(
        f"(float[1,2,4,4] x) => (float[1,n,4,4] y) {{ {text} }}",
        {"u": weight(2, 2, 1, 1), "v": weight(3, 2, 1, 1), "w": weight(2, 2, 1, 1) + 1,
         "p": weight(1, 2, 1, 1), "q": weight(3, 1, 1), "s": weight(4, 4)},
    )  # fmt: skip
    assert [node.op_type for node in tried(model)["merge"].proto.graph.node] == expected


STAYS = {
    "another input": "a = Conv(x, u)  z = Neg(x)  b = Conv(z, v)",
    "another stride": "a = Conv<strides = [2,2]>(x, u)  b = Conv(x, v)",
    "another kernel": "a = Conv(x, k)  b = Conv(x, v)",
    "another activation": "a = Conv(x, u)  d = Neg(x)  b = Conv(d, v)",
    "groups": "a = Conv<group = 2>(x, g)  b = Conv<group = 2>(x, h)",
    "a weight that is computed": "s = Relu(u)  a = Conv(x, s)  b = Conv(x, v)",
    "a bias that is computed": "s = Relu(i)  a = Conv(x, u, s)  b = Conv(x, v)",
    "products of what flows": "a = MatMul(x, x)  z = Neg(x)  b = MatMul(x, z)",
    "one alone": "a = Conv(x, u)  b = Neg(x)",
}


@pytest.mark.parametrize("text", STAYS.values(), ids=STAYS)
def test_what_are_no_siblings_stays(text: str) -> None:
    model = of_text(
        f"(float[1,2,4,4] x) => (float[n,c,h,w] a, float[n,c,h,w] b) {{ {text} }}",
        {"u": weight(2, 2, 1, 1), "v": weight(3, 2, 1, 1), "k": weight(2, 2, 2, 2),
         "i": weight(2), "g": weight(2, 1, 1, 1), "h": weight(4, 1, 1, 1)},
    )  # fmt: skip
    for name in ("merge", "merge-inner"):
        assert rewritten(model, name).proto.graph.node == model.proto.graph.node


def test_weights_that_others_read_stay_and_the_others_go() -> None:
    model = of_text(
        """(float[2,3] x) => (float[2,4] p, float[2,4] q, float[3,4] r) {
            p = MatMul(x, a)  q = MatMul(x, b)  r = Neg(b)
        }""",
        {"a": weight(3, 4), "b": weight(3, 4)},
    )  # fmt: skip
    model.proto.graph.input.append(
        onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [3, 4])
    )
    graph = rewritten(model, "merge").proto.graph
    assert [value.name for value in graph.input] == ["x"]
    assert [w.name for w in graph.initializer] == ["b", "n0/merged/weight", "p/merged/split/sizes"]


def test_names_that_are_taken_are_not_used_again() -> None:
    model = of_text(
        """(float[2,3] x) => (float[2,4] p, float[2,4] q, float[2,3] r) {
            "p/merged" = Neg(x)  p = MatMul(x, a)  q = MatMul(x, b)  r = Relu("p/merged")
        }""".replace('"p/merged"', "taken"),
        {"a": weight(3, 4), "b": weight(3, 4)},
    )  # fmt: skip
    for node in model.proto.graph.node:
        node.input[:] = ["p/merged" if name == "taken" else name for name in node.input]
        node.output[:] = ["p/merged" if name == "taken" else name for name in node.output]
    model.proto.graph.node[0].name = "n1/merged"
    tried(as_it_is(model.proto))


def test_products_of_one_tensor_reshaped_several_times_are_siblings() -> None:
    model = of_text(
        """(float[2,2,3] x) => (float[4,5] p, float[4,2] q, float[12,1] r) {
            a = Reshape(x, rows)  b = Reshape(x, same)  c = Reshape(x, column)
            p = Gemm(a, u, i)  q = Gemm(b, v)  r = Gemm(c, w)
        }""",
        {"rows": np.array([4, 3]), "same": np.array([4, 3]), "column": np.array([12, 1]),
         "u": weight(3, 5), "v": weight(3, 2), "w": weight(1, 1), "i": weight(5)},
    )  # fmt: skip
    assert change(model, tried(model)["merge"]) == {"Reshape": -1, "Gemm": -1, "Split": 1}


@pytest.mark.parametrize(
    ("rewrite", "name"),
    [("none", "twice"), ("merge", "merge+twice"), ("bands-2", "bands-2+twice")],
)
def test_operators_are_there_twice_after_any_rewrite(
    rewrite: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)
    model = loaded(build("googlenet", image=128), tmp_path)
    once = rewritten(model, rewrite)
    graph, machine = graph_from_model(once), Machine(DEVICES[:2], 1)
    slots = tuple(Slot(v, machine.placements[v // 5 % 2]) for v in range(len(graph)))
    costs = durations(*[1.0] * len(graph), unmeasured=linear(20.0, 1024.0))
    found = recompute(graph, costs, machine, Schedule(slots))
    assert found.duplicates
    assert twice(rewrite) == name
    result = rewritten(model, name, found.duplicates)
    assert result.rewrite == name
    assert result.proto == rewritten(model, name, found.duplicates).proto
    assert graph_from_model(result).operators == found.graph.operators
    assert_well_formed(result)
    feeds = feeds_for(model.proto)
    assert_close(reference(result.proto, feeds), reference(once.proto, feeds))
    stranger = Duplicate("stranger", "stranger/copy", ())
    with pytest.raises(KeyError):
        rewritten(model, name, [stranger])


def test_what_ends_a_branch_stays_in_the_inner_merge() -> None:
    model = of_text(
        """(float[1,2,4,4] x) => (float[1,9,4,4] y) {
            a = Conv(x, u)  b = Conv(x, u)  c = Conv(x, u)  d = Relu(a)
            p = Conv<pads = [1,1,1,1]>(b, k)  q = Conv<pads = [1,1,1,1]>(c, k)
            y = Concat<axis = 1>(d, p, q)
        }""",
        {"u": weight(3, 2, 1, 1), "k": weight(3, 3, 3, 3)},
    )  # fmt: skip
    found = tried(model)
    assert change(model, found["merge"]) == {"Conv": -2, "Split": 1}
    assert change(model, found["merge-inner"]) == {"Conv": -1, "Split": 1}


@pytest.mark.parametrize(
    ("first", "second", "kernel"),
    [
        ("Conv(x, k11)", "Conv<pads = [1,1,1,1]>(x, k33)", [3, 3]),
        ("Conv<pads = [0,1,0,1]>(x, k13)", "Conv<pads = [1,0,1,0]>(x, k31)", [3, 3]),
        ("Conv<pads = [0,0,0,0]>(x, k33)", "Conv<pads = [1,1,1,1]>(x, k55)", [5, 5]),
        ("Conv<strides = [2,2]>(x, k11)", "Conv<strides = [2,2], pads = [1,1,1,1]>(x, k33)",
         [3, 3]),
        ("Conv<dilations = [2,2]>(x, k33)", "Conv<dilations = [2,2], pads = [2,2,2,2]>(x, k55)",
         [5, 5]),
        ("Conv<pads = [1,1,0,0]>(x, k22)", "Conv<pads = [1,1,1,1]>(x, k33)", [3, 3]),
        ("Conv<dilations = [2,2]>(x, k33)", "Conv<dilations = [2,2], pads = [1,1,1,1]>(x, k33)",
         None),
        ("Conv<dilations = [2,2]>(x, k33)", "Conv<dilations = [2,2], pads = [1,1,1,1]>(x, k44)",
         None),
        ("Conv(x, k11)", "Conv(x, k33)", None),
        ("Conv(x, k11)", "Conv<auto_pad = \"SAME_UPPER\">(x, k33)", None),
    ],
)  # fmt: skip
def test_zeros_make_kernels_of_one_size(first: str, second: str, kernel: list[int] | None) -> None:
    shapes = {"k11": (1, 1), "k13": (1, 3), "k31": (3, 1), "k22": (2, 2), "k33": (3, 3),
              "k44": (4, 4),              "k55": (5, 5)}  # fmt: skip
    text = f"""(float[1,2,9,9] x) => (float[1,c,h,w] y, float[1,d,i,j] z) {{
        y = {first}  z = {second}
    }}"""
    used = {name: weight(3, 2, *shape) for name, shape in shapes.items() if name in text}
    found = tried(of_text(text, used))
    assert op_types(found["merge"])["Conv"] == 2
    merged = found["merge-padded"].proto.graph.node[0]
    if kernel is None:
        assert op_types(found["merge-padded"])["Conv"] == 2
    else:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in merged.attribute}
        assert attributes["kernel_shape"] == kernel


@pytest.mark.parametrize("op_type", ["Gelu", "FastGelu", "BiasGelu"])
def test_operators_of_onnx_runtimes_own_move_before_the_split(op_type: str) -> None:
    nodes = []
    for number, name in enumerate("ab"):
        extra = [f"i{number}"] if op_type == "BiasGelu" else []
        nodes += [
            onnx.helper.make_node("MatMul", ["x", f"w{number}"], [f"m{number}"], f"matmul_{name}"),
            onnx.helper.make_node(
                op_type, [f"m{number}", *extra], [name], f"gelu_{name}", domain="com.microsoft"
            ),
        ]
    arrays = {"w0": weight(3, 4), "w1": weight(3, 2), "i0": weight(4), "i1": weight(2)}
    floats = onnx.TensorProto.FLOAT
    kinds = {"x": [5, 3], "m0": [5, 4], "m1": [5, 2], "a": [5, 4], "b": [5, 2]}
    value = {n: onnx.helper.make_tensor_value_info(n, floats, s) for n, s in kinds.items()}
    graph = onnx.helper.make_graph(
        nodes, "g", [value["x"]], [value["a"], value["b"]],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
         if any(name in node.input for node in nodes)],
        value_info=[value["m0"], value["m1"]],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = as_it_is(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    feeds = feeds_for(model.proto)
    result = rewritten(model, "merge")
    assert [node.op_type for node in result.proto.graph.node] == ["MatMul", op_type, "Split"]
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
    assert result.tensors["a/merged"].shape == (5, 6)


STEPS = ["Relu({0})", "Sigmoid({0})", "Neg({0})", "Add({0}, {1})", "Add({1}, {0})"]
"""What may come after a sibling, its result and a bias of its own given."""


@st.composite
def random_siblings(draw: DrawFn) -> tuple[str, dict[str, Array]]:
    """Convolutions or products of one input, what comes after each, and how that is joined."""
    kind = draw(st.sampled_from(["Conv", "MatMul", "Gemm"]))
    opening = {"Conv": "float[1,2,5,5] x", "MatMul": "float[2,3,4] x", "Gemm": "float[3,4] x"}
    axis = 1 if kind == "Conv" else -1
    common = draw(st.none() | st.lists(st.sampled_from(STEPS), max_size=3))
    shapes: dict[str, tuple[int, ...]] = {}
    lines, outputs = [], []
    ends: dict[int, list[str]] = {}  # by the size of their images
    for number in range(draw(st.integers(2, 4))):
        count, name = draw(st.integers(1, 3)), f"t{number}"
        operator, size, added = _operator(draw, kind, number, count)
        shapes |= added
        lines.append(f"{name} = {operator}")
        steps = draw(st.lists(st.sampled_from(STEPS), max_size=2)) if common is None else common
        for place, step in enumerate(steps):
            if draw(st.integers(0, 9)) == 0:
                outputs.append(name)
            bias, after = f"{name}bias{place}", f"{name}s{place}"
            shapes[bias] = (count, 1, 1) if kind == "Conv" else (count,)
            lines.append(f"{after} = {step.format(name, bias)}")
            name = after
        if draw(st.integers(0, 9)) == 0:
            outputs.append(name)
        ends.setdefault(size, []).append(name)
    for size, names in ends.items():
        joined = draw(st.permutations(names))[: draw(st.integers(0, len(names)))]
        outputs += [name for name in names if name not in joined]
        if joined:
            lines.append(f"j{size} = Concat<axis = {axis}>({', '.join(joined)})")
            lines.append(f"y{size} = {draw(st.sampled_from(['Relu', 'Neg']))}(j{size})")
            outputs.append(f"y{size}")
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    results = ", ".join(f"float {name}" for name in dict.fromkeys(outputs))
    return f"({opening[kind]}) => ({results}) {{ {'  '.join(lines)} }}", weights


def _operator(
    draw: DrawFn, kind: str, number: int, count: int
) -> tuple[str, int, dict[str, tuple[int, ...]]]:
    """An operator, the size of the image that it makes, and the shapes of its weights."""
    names, attributes, size = [f"w{number}"], "", 0
    shapes: dict[str, tuple[int, ...]] = {f"w{number}": (4, count)}
    if kind == "Conv":
        kernel, stride = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 1, 2]))
        pad = draw(st.sampled_from([kernel // 2, 1]))
        attributes = f"<pads = [{pad},{pad},{pad},{pad}], strides = [{stride},{stride}]>"
        shapes[f"w{number}"] = (count, 2, kernel, kernel)
        size = (5 + 2 * pad - kernel) // stride + 1
    if kind == "Gemm" and draw(st.booleans()):
        attributes, shapes[f"w{number}"] = "<transB = 1>", (count, 4)
    if kind != "MatMul" and draw(st.booleans()):
        names.append(f"i{number}")
        shapes[f"i{number}"] = (count,)
    return f"{kind}{attributes}(x, {', '.join(names)})", size, shapes


@settings(max_examples=150, deadline=None)
@given(random_siblings(), st.integers(0, 99))
def test_every_rewrite_keeps_the_outputs(case: tuple[str, dict[str, Array]], seed: int) -> None:
    text, weights = case
    model = of_text(text, weights)
    for result in tried(model, seed).values():
        assert len(result.proto.graph.node) <= len(model.proto.graph.node)


def test_siblings_are_merged_before_long_chains_too() -> None:
    pools = "\n".join(
        f"p{number + 1} = MaxPool<kernel_shape = [1,1]>(p{number})" for number in range(600)
    )
    model = of_text(
        f"""(float[1,4,4,4] x) => (float[1,4,4,4] y, float[1,4,4,4] z) {{
            p0 = Conv(x, u)
            b = Conv(x, v)
            z = Relu(b)
            {pools}
            y = Relu(p600)
        }}""",
        {"u": weight(4, 4, 1, 1), "v": weight(4, 4, 1, 1)},
    )
    merged = rewritten(model, "merge")
    assert op_types(merged)["Conv"] == 1
    feeds = feeds_for(model.proto)
    assert_close(reference(merged.proto, feeds), reference(model.proto, feeds))
