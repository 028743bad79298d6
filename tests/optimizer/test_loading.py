"""From a file to a model that can be scheduled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched.loading import _require_arrays, graph_from_model, load_model
from onnxsched.shapes import tensor_types
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.errors import ModelError, UsageError
from onnxsched_runtime.tensor import TensorType
from sample_models import build
from support.models import CPU, MODELS, Array, annotated, assert_same, feeds_for, reference, weight
from support.optimizing import assert_close, loaded, parsed, saved
from support.strategies import GPU

FLOAT = onnx.TensorProto.FLOAT


def refusal(model: onnx.ModelProto, folder: Path) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        loaded(model, folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_computes_the_same(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    optimized = loaded(model, tmp_path).proto
    for seed in range(3):
        feeds = feeds_for(model, seed)
        assert_same(reference(optimized, feeds), reference(model, feeds))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file '.*nowhere\.onnx'; give the path"):
        load_model(tmp_path / "nowhere.onnx", CPU)


def test_a_symbol_is_bound_everywhere(tmp_path: Path) -> None:
    model = parsed("(float[n,3] x, float[n,3] z) => (float[n,3] y) { y = Add(x, z) }")
    found = loaded(model, tmp_path, {"x": (5, 3)})
    assert found.bound_shapes == {"x": (5, 3), "z": (5, 3)}
    assert found.tensors["y"] == TensorType(FLOAT, (5, 3))


def test_inputs_and_outputs_may_be_of_unknown_rank(tmp_path: Path) -> None:
    model = parsed("(float[1] x) => (float[1] y, float[1] z) { y = Neg(x)  z = Exp(x) }")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match=r"have no value: x \(of unknown rank\); give .*--shape"):
        loaded(model, tmp_path)
    found = loaded(model, tmp_path, {"x": (2, 3)})
    assert found.bound_shapes == {"x": (2, 3)}
    assert found.tensors["y"] == found.tensors["z"] == TensorType(FLOAT, (2, 3))
    feeds = {"x": feeds_for(found.proto)["x"]}
    assert_same(reference(found.proto, feeds), reference(model, feeds))


def test_node_names_become_unique_and_unique_ones_stay(tmp_path: Path) -> None:
    model = parsed(
        """(float[3] x) => (float[3] y) {
            [same] a = Neg(x)
            [same] b = Abs(a)
            [same_1] c = Exp(b)
            d = Sin(c)
            [own] y = Cos(d)
        }"""
    )
    names = [node.name for node in loaded(model, tmp_path).proto.graph.node]
    assert names == ["same", "same_2", "same_1", "Sin_d", "own"]


def test_types_need_not_be_declared(tmp_path: Path) -> None:
    model = build("tiny")
    declared = loaded(model, tmp_path)
    del model.graph.value_info[:]
    undeclared = loaded(model, tmp_path)
    outputs = {name for node in undeclared.proto.graph.node for name in node.output}
    assert {name: undeclared.tensors[name] for name in outputs} == {
        name: declared.tensors[name] for name in outputs
    }
    assert undeclared.host_reasons == {}


def test_weights_count_as_no_input(tmp_path: Path) -> None:
    model = parsed("(float[3] x, float[3] w) => (float[3] y) { y = Add(x, w) }", w=weight(3))
    assert loaded(model, tmp_path).bound_shapes == {"x": (3,)}


def test_ir_versions_newer_than_onnxruntime_reads_are_loaded(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y) { y = Relu(x) }", ir_version=14)
    assert len(loaded(model, tmp_path).proto.graph.node) == 1


def test_old_ir_versions_are_raised_so_that_nodes_can_carry_keys(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y) { y = Relu(x) }", ir_version=4, opset=9)
    assert loaded(model, tmp_path).proto.ir_version >= 10


def test_functions_are_inlined(tmp_path: Path) -> None:
    twice = """<domain: "local", opset_import: ["" : 17]>
        twice (a) => (b) { t = Neg(a)  b = Add(t, t) }"""
    model = parsed("(float[3] x) => (float[3] y) { y = local.twice(x) }", functions=twice)
    found = loaded(model, tmp_path)
    assert [node.op_type for node in found.proto.graph.node] == ["Neg", "Add"]
    assert not found.baseline.functions


def sparse_constant(array: Array, is_flat: bool) -> onnx.NodeProto:
    """A Constant `w` of the elements that are not 0, and where they are."""
    places = array.ravel().nonzero()[0] if is_flat else np.argwhere(array)
    values, indices = (
        onnx.numpy_helper.from_array(part, "w") for part in (array[array != 0], places)
    )
    sparse = onnx.helper.make_sparse_tensor(values, indices, array.shape)
    return onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse)


SPARSE = {
    "graph": "(float[2,3] x, bool f) => (float[2,4] y) { y = MatMul(x, w) }",
    "branch": """(float[2,3] x, bool f) => (float[2,4] y) {
        y = If(f) <
            then_branch = yes () => (float[2,4] u) { u = MatMul(x, w) },
            else_branch = no () => (float[2,4] v) { v = MatMul(x, w) }
        >
    }""",
    "function": "(float[2,3] x, bool f) => (float[2,4] y) { y = local.times(x) }",
}
TIMES = '<domain: "local", opset_import: ["" : 17]> times (a) => (b) { b = MatMul(a, w) }'


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("place", SPARSE)
def test_sparse_constants_become_dense(place: str, is_flat: bool, tmp_path: Path) -> None:
    array = weight(3, 4) * (weight(3, 4) > 0)
    model = parsed(SPARSE[place], functions=TIMES if place == "function" else "")
    bodies: dict[str, list[Any]] = {
        "graph": [model.graph],
        "branch": [attribute.g for attribute in model.graph.node[0].attribute],
        "function": list(model.functions),
    }
    for body in bodies[place]:
        body.node.insert(0, sparse_constant(array, is_flat))
    found = loaded(model, tmp_path)
    graph_from_model(found)
    feeds = feeds_for(model)
    for proto in (found.proto, found.baseline):
        named = {value.name for value in proto.graph.input}
        given = {name: value for name, value in feeds.items() if name in named}
        assert_same(reference(proto, given), [feeds["x"] @ array])
    assert "sparse" not in str(found.proto)


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    model = MODELS["large_weight"]()
    path = tmp_path / "in.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights", size_threshold=0)
    feeds = feeds_for(model)
    assert_same(reference(load_model(path, CPU).proto, feeds), reference(model, feeds))
    (tmp_path / "weights").unlink()
    with pytest.raises(ModelError, match="weights beside"):
        load_model(path, CPU)


@pytest.mark.parametrize("count", [32, 33, 64, 100])
def test_a_wide_concat_becomes_narrow_ones_of_the_same_value(count: int, tmp_path: Path) -> None:
    names = [f"x{number}" for number in range(count)]
    inputs = ", ".join(f"float[1,{1 + number % 3}] {name}" for number, name in enumerate(names))
    width = sum(1 + number % 3 for number in range(count))
    model = parsed(
        f"({inputs}) => (float[1,{width}] y) {{"
        f" all = Concat<axis = 1>({', '.join(names)})  y = Neg(all) }}"
    )
    found = loaded(model, tmp_path)
    concats = [node for node in found.proto.graph.node if node.op_type == "Concat"]
    assert max(len(node.input) for node in concats) <= 32
    assert (len(concats) == 1) == (count <= 32)
    feeds = feeds_for(model)
    np.testing.assert_array_equal(reference(found.proto, feeds), reference(model, feeds))
    np.testing.assert_array_equal(reference(found.baseline, feeds), reference(model, feeds))


def test_an_output_that_is_constant_has_an_operator_with_a_name(tmp_path: Path) -> None:
    model = parsed(
        """(float[3] x) => (float[3] c, float[3] d, float[3] y) {
            c = Neg(w)
            d = Exp(w)
            y = Add(x, c)
        }""",
        w=weight(3),
    )
    proto = loaded(model, tmp_path).proto
    writers = {name: node.op_type for node in proto.graph.node for name in node.output}
    assert writers == {"y": "Add", "c": "Identity", "d": "Identity"}
    names = [node.name for node in proto.graph.node]
    assert all(names)
    assert len(set(names)) == 3
    feeds = feeds_for(model)
    assert_same(reference(proto, feeds), reference(model, feeds))


def test_branches_may_read_an_output_that_is_constant(tmp_path: Path) -> None:
    model = parsed(
        """(float[3] x, bool flag) => (float[3] c, float[3] y) {
            c = Neg(w)
            y = If(flag) <
                then_branch = yes () => (float[3] u) { u = Add(x, c) },
                else_branch = no () => (float[3] v) { v = Mul(x, c) }
            >
        }""",
        w=weight(3),
    )
    found = loaded(model, tmp_path)
    graph_from_model(found)
    for seed in range(4):
        feeds = feeds_for(model, seed)
        assert_same(reference(found.proto, feeds), reference(model, feeds))


def test_a_model_of_constants_has_nothing_to_schedule(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y) { y = Neg(w) }", w=weight(3))
    assert "Nothing is left to schedule" in refusal(model, tmp_path)


def test_an_input_passed_through_is_refused_by_name(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y, float[3] x) { y = Neg(x) }")
    assert "Output 'x' is an input passed through" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ("(float[3] x) => (float[3] y) { y = Relu(q) }", 17, "input 'q'"),
        ("(float[3] x) => (float[3] y) { y = Relu(x, x) }", 17, "input size 2"),
        ("(float[3] x) => (float[3] y) { z = Relu(x) }", 17, "output 'y'"),
        ("(float[3] x) => (float[3] y) { y = Unheard(x) }", 17, "Unheard"),
        ("(float[3] x) => (float[3] y) { y = local.unheard(x) }", 17, "unheard"),
        ("(float[2,3] x) => (float[2,3] y) { y = MatMul(x, x) }", 17, "Incompatible dimensions"),
        ("(float[3] x) => (float[3] y) { y = Relu(x) }", 99, "opset"),
    ],
)
def test_an_invalid_model_is_refused_in_one_sentence(
    text: str, opset: int, reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(parsed(text, opset=opset), tmp_path)


def test_inputs_must_be_tensors(tmp_path: Path) -> None:
    model = parsed("(seq(float[2]) s) => (int64 y) { y = SequenceLength(s) }")
    assert "Input 's'" in refusal(model, tmp_path)


@pytest.mark.parametrize("code", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT8E4M3FN])
def test_types_that_numpy_lacks_are_refused_on_the_cpu(code: int, tmp_path: Path) -> None:
    model = parsed(
        f"(float[3] x) => (float[3] y) {{ a = Cast<to = {code}>(x)  y = Cast<to = 1>(a) }}",
        opset=21,
    )
    assert "'a' is a " in refusal(model, tmp_path)


@pytest.mark.parametrize("host", ["a", "y"])
def test_on_a_gpu_the_host_touches_no_type_that_numpy_lacks(host: str) -> None:
    code = onnx.TensorProto.BFLOAT16
    model = onnx.shape_inference.infer_shapes(
        parsed(
            f"""(float[3] x) => (float[3] y) {{
                [a] a = Cast<to = {code}>(x)
                [b] b = Neg(x)
                [y] y = Cast<to = 1>(a)
            }}"""
        )
    )
    _require_arrays(model, tensor_types(model), {}, GPU)
    _require_arrays(model, tensor_types(model), {"b": "for once"}, GPU)
    with pytest.raises(ModelError, match=r"'a' is a .* outside of the GPU; cast it"):
        _require_arrays(model, tensor_types(model), {host: "for once"}, GPU)


def test_an_annotated_model_is_loaded_like_any_other(tmp_path: Path) -> None:
    model = MODELS["fork_join"]()
    plain = loaded(model, tmp_path)
    again = loaded(annotated(plain.proto), tmp_path)
    assert {node.name for node in again.proto.graph.node} == {
        node.name for node in plain.proto.graph.node
    }
    feeds = feeds_for(model)
    assert_same(reference(again.proto, feeds), reference(model, feeds))
    read_annotation(annotated(again.proto))


def test_the_graph_has_an_edge_for_each_tensor_between_operators(tmp_path: Path) -> None:
    graph = graph_from_model(loaded(MODELS["diamond"](), tmp_path))
    kinds = [operator.op_type for operator in graph.operators]
    assert {(kinds[e.producer], kinds[e.consumer], e.tensor, e.nbytes) for e in graph.edges} == {
        ("Neg", "Relu", "top", 24),
        ("Neg", "Sigmoid", "top", 24),
        ("Relu", "Add", "left", 24),
        ("Sigmoid", "Add", "right", 24),
    }


def test_what_branches_read_is_an_edge(tmp_path: Path) -> None:
    graph = graph_from_model(loaded(MODELS["branch"](), tmp_path))
    conditional = next(i for i, o in enumerate(graph.operators) if o.op_type == "If")
    assert {edge.tensor for edge in graph.incoming[conditional]} == {"a", "b"}
    assert graph.operators[conditional].host_reason is not None


def test_tensors_of_unknown_size_count_no_bytes(tmp_path: Path) -> None:
    for name in ("data_dependent", "sequence"):
        graph = graph_from_model(loaded(MODELS[name](), tmp_path))
        nbytes = {edge.tensor: edge.nbytes for edge in graph.edges}
        assert nbytes["a"] > 0
        assert 0 in nbytes.values()


def test_operators_know_their_weights_and_what_is_kept(tmp_path: Path) -> None:
    model = parsed(
        "(float[3,4] x) => (float[3,4] y)"
        "{ hidden = MatMul(x, w) bent = Tanh(hidden) y = MatMul(bent, w) }",
        w=weight(4, 4),
    )
    first, bent, last = graph_from_model(loaded(model, tmp_path)).operators
    assert {(w.tensor, w.nbytes) for w in first.weights} == {("x", 48), ("w", 64)}
    assert [w.tensor for w in last.weights] == ["w"]
    assert (first.kept_nbytes, bent.weights, last.kept_nbytes) == (0, (), 48)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_that_are_inputs_too_are_folded(ir_version: int, tmp_path: Path) -> None:
    model = parsed(
        "(float[2,3] x, float[3,4] w) => (float[2,4] y) { n = Neg(w)  y = MatMul(x, n) }",
        w=weight(3, 4),
        ir_version=ir_version,
        opset=8,
    )
    found = loaded(model, tmp_path)
    assert [node.op_type for node in found.proto.graph.node] == ["MatMul"]
    for proto in (found.proto, found.baseline):
        assert [value.name for value in proto.graph.input] == ["x"]
        feeds = {"x": feeds_for(model)["x"]}
        assert_same(reference(proto, feeds), reference(model, feeds))


def test_the_copy_of_an_output_has_a_name_of_its_own(tmp_path: Path) -> None:
    model = parsed(
        """(float[3] x) => (float[3] y, float[3] k) { y = Add(x, k2) }""",
        k=weight(3),
        k2=weight(3) + 1,
    )
    model.graph.initializer[1].name = model.graph.node[0].input[1] = "k/constant"
    feeds = feeds_for(model)
    expected = reference(model, feeds)
    for _ in range(3):  # what is written may be loaded again
        model = loaded(model, tmp_path).proto
        onnx.checker.check_model(model)
        assert_same(reference(model, feeds), expected)


@pytest.mark.parametrize(
    "text",
    [
        "(float[3] x) => (float[3] y, float[3] k) { y = Add(x, k) }",
        "(float[3] x) => (float[3] y) { a = Neg(x)  b = Add(a, k)  y = Max(b, b) }",
    ],
)
def test_half_precision_takes_stored_outputs_and_what_is_read_twice(
    text: str, tmp_path: Path
) -> None:
    model = parsed(text, k=weight(3))
    found = load_model(saved(model, tmp_path), CPU, precision="fp16")
    feeds = feeds_for(model)
    assert_close(reference(found.proto, feeds), reference(model, feeds), 1e-2)


def test_a_very_wide_concat_is_hardly_deep(tmp_path: Path) -> None:
    count = 1025
    names = [f"x{number}" for number in range(count)]
    inputs = ", ".join(f"float[1,1] {name}" for name in names)
    model = parsed(
        f"({inputs}) => (float[1,{count}] y) {{ y = Concat<axis = 1>({', '.join(names)}) }}"
    )
    baseline = loaded(model, tmp_path).baseline
    depth = dict.fromkeys(names, 0)
    for node in baseline.graph.node:
        depth[node.output[0]] = 1 + max(depth[name] for name in node.input)
    assert depth["y"] == 3
    feeds = feeds_for(model)
    np.testing.assert_array_equal(reference(baseline, feeds), reference(model, feeds))
