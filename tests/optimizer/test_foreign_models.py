"""Models as exporters, converters and editors leave them, which plain ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxsched
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.lowering import inferred_by_ort
from onnxsched_runtime.model import input_values
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.tensor import TensorType
from support.models import CPU, assert_same, feeds_for, reference, weight
from support.optimizing import loaded, parsed, plain_outputs, saved

FLOAT = TensorProto.FLOAT


def with_domain(model: onnx.ModelProto, domain: str) -> onnx.ModelProto:
    model.opset_import.add(domain=domain, version=1)
    return model


def optimized(model: onnx.ModelProto, folder: Path, **options: object) -> Path:
    """What `optimize` writes; it loads in plain ONNX Runtime and passes onnx's checker."""
    path = folder / "out.onnx"
    plain = {"device": "cpu", "cache_dir": None, "policy": "wavefront", "streams": 3}
    onnxsched.optimize(saved(model, folder), path, **{**plain, **options})  # type: ignore[arg-type]
    onnx.checker.check_model(str(path))
    return path


def test_what_operators_of_ort_write_has_a_type(tmp_path: Path) -> None:
    model = with_domain(
        parsed(
            """(float[2,8] x) => (float[2,8] y) {
                a = com.microsoft.Gelu(x)
                b = com.microsoft.FusedMatMul(a, w)
                s = Sigmoid(b)
                t = Tanh(b)
                y = Add(s, t)
            }""",
            w=weight(8, 8),
        ),
        "com.microsoft",
    )
    found = loaded(model, tmp_path)
    assert found.host_reasons == {}
    assert set(found.tensors.values()) == {TensorType(FLOAT, (2, 8))}
    feeds = feeds_for(model)
    path = optimized(model, tmp_path)
    assert_same(plain_outputs(path, feeds), reference(model, feeds))


def test_a_tensor_of_unknown_rank_is_no_scalar(tmp_path: Path) -> None:
    model = parsed(
        """(float[2,8] x, bool c) => (float y) {
            a = Relu(x)
            i = If(c) <
                then_branch = yes () => (float u) { u = MatMul(a, w) },
                else_branch = no () => (float v) { v = ReduceSum <keepdims = 0> (a) }
            >
            y = Relu(i)
        }""",
        w=weight(8, 8),
    )
    for value in (*model.graph.output, *(a.g.output[0] for a in model.graph.node[1].attribute)):
        value.type.tensor_type.ClearField("shape")
    source = loaded(model, tmp_path).source
    types = inferred_by_ort(source, SessionSettings(CPU, host_operators=True))
    assert {types[name].shape for name in ("i", "y")} == {None}


def declare_stale(model: onnx.ModelProto, name: str) -> None:
    """Let the model declare a tensor as it is at another batch size."""
    stale = helper.make_tensor_value_info(name, FLOAT, [1, 8])
    for value in model.graph.output:
        if value.name == name:
            value.CopyFrom(stale)
            return
    model.graph.value_info.append(stale)


@pytest.mark.parametrize("where", ["a", "y"])
def test_shapes_that_inputs_contradict_are_not_believed(where: str, tmp_path: Path) -> None:
    model = parsed(
        "(float[N,8] x) => (float[N,8] y) { a = MatMul(x, w)  b = Relu(a)  y = Add(a, b) }",
        w=weight(8, 8),
    )
    declare_stale(model, where)
    found = loaded(model, tmp_path, {"x": (2, 8)})
    assert {kind.shape for kind in found.tensors.values()} == {(2, 8)}


@pytest.mark.parametrize("where", ["a", "y"])
def test_stale_shapes_behind_operators_of_ort_are_not_believed(where: str, tmp_path: Path) -> None:
    model = with_domain(
        parsed("(float[N,8] x) => (float[N,8] y) { a = com.microsoft.Gelu(x)  y = Add(a, x) }"),
        "com.microsoft",
    )
    declare_stale(model, where)
    found = loaded(model, tmp_path, {"x": (2, 8)})
    assert {kind.shape for kind in found.tensors.values()} == {(2, 8)}


def test_a_size_that_the_data_decide_is_not_believed(tmp_path: Path) -> None:
    model = parsed("(float[2,8] x) => (int64[2,16] y) { y = NonZero(x) }")
    found = loaded(model, tmp_path)
    assert found.host_reasons == {"NonZero_y": "the shape of 'y' depends on the data"}
    assert found.proto.graph.output[0] == model.graph.output[0]


def test_shapes_that_only_the_model_knows_are_believed(tmp_path: Path) -> None:
    model = with_domain(
        parsed("(float[2,8] x) => (float[2,8] y) { a = ai.onnx.ml.Scaler(x)  y = Relu(a) }"),
        "ai.onnx.ml",
    )
    scaler = model.graph.node[0]
    scaler.attribute.append(helper.make_attribute("offset", [0.5]))
    scaler.attribute.append(helper.make_attribute("scale", [2.0]))
    model.graph.value_info.append(helper.make_tensor_value_info("a", FLOAT, [2, 8]))
    assert loaded(model, tmp_path).tensors["a"] == TensorType(FLOAT, (2, 8))


def test_an_output_keeps_the_shape_that_it_was_declared_with(tmp_path: Path) -> None:
    model = with_domain(
        parsed("(float[N,8] x) => (float[N,8] y) { y = ai.onnx.ml.Normalizer(x) }"),
        "ai.onnx.ml",
    )
    model.graph.node[0].attribute.append(helper.make_attribute("norm", "L1"))
    path = optimized(model, tmp_path, shapes={"x": (2, 8)})
    assert onnx.load(path).graph.output[0] == model.graph.output[0]


def branching(kind: str, first: str = "Add(x, x)") -> onnx.ModelProto:
    """Branches that read what is computed outside of them."""
    return parsed(
        f"""({kind}[2,8] x, bool c) => ({kind}[2,8] y) {{
            m = {first}
            s = Sigmoid(m)
            i = If(c) <
                then_branch = yes () => ({kind}[2,8] u) {{ u = Relu(m) }},
                else_branch = no () => ({kind}[2,8] v) {{ v = Sigmoid(m) }}
            >
            y = Add(i, s)
        }}"""
    )


@pytest.mark.parametrize("has_weight", [True, False])
def test_branches_name_their_tensors_apart_from_those_outside(
    has_weight: bool, tmp_path: Path
) -> None:
    """ONNX Runtime calls the casts of float16 that it adds alike inside and outside."""
    model = branching("float16", "MatMul(x, w)" if has_weight else "Add(x, x)")
    if has_weight:
        half = weight(8, 8).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(half, "w"))
    feeds = feeds_for(model)
    found, expected = plain_outputs(optimized(model, tmp_path), feeds), reference(model, feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-3)


def test_so_do_branches_in_branches(tmp_path: Path) -> None:
    model = parsed(
        """(float16[2,8] x, bool c) => (float16[2,8] y) {
            m = Add(x, x)
            i = If(c) <
                then_branch = yes () => (float16[2,8] u) {
                    n = Relu(m)
                    u = If(c) <
                        then_branch = inner () => (float16[2,8] p) { p = Add(m, n) },
                        else_branch = other () => (float16[2,8] q) { q = Sub(m, n) }
                    >
                },
                else_branch = no () => (float16[2,8] v) { v = Sigmoid(m) }
            >
            y = Add(i, m)
        }"""
    )
    feeds = feeds_for(model)
    found, expected = plain_outputs(optimized(model, tmp_path), feeds), reference(model, feeds)
    np.testing.assert_allclose(found[0], expected[0], atol=4e-3)


def test_half_precision_of_a_model_with_branches_can_be_opened(tmp_path: Path) -> None:
    model = branching("float")
    path = tmp_path / "out.onnx"
    onnxsched.optimize(
        saved(model, tmp_path), path, device="cpu", cache_dir=None, precision="fp16"
    )
    feeds = feeds_for(model)
    np.testing.assert_allclose(
        plain_outputs(path, feeds)[0], reference(model, feeds)[0], atol=1e-2
    )


@pytest.mark.parametrize("place", ["graph", "branch"])
def test_nodes_may_come_in_any_order(place: str, tmp_path: Path) -> None:
    chain = "a = Relu(x)  b = Neg(a)  {} = Add(a, b)"
    text = {
        "graph": f"(float[2,8] x, bool c) => (float[2,8] y) {{ {chain.format('y')} }}",
        "branch": f"""(float[2,8] x, bool c) => (float[2,8] y) {{
            y = If(c) <
                then_branch = yes () => (float[2,8] u) {{ {chain.format("u")} }},
                else_branch = no () => (float[2,8] v) {{ v = Neg(x) }}
            >
        }}""",
    }[place]
    model = parsed(text)
    feeds = feeds_for(model)
    expected = reference(model, feeds)
    graph = model.graph if place == "graph" else model.graph.node[0].attribute[0].g
    nodes = [*graph.node]
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    assert_same(plain_outputs(optimized(model, tmp_path), feeds), expected)


def test_a_circle_is_no_model(tmp_path: Path) -> None:
    model = parsed("(float[2] x) => (float[2] y) { a = Add(x, y)  y = Relu(a) }")
    with pytest.raises(ModelError, match="is no valid ONNX model"):
        loaded(model, tmp_path)


def sparse(dims: list[int]) -> onnx.SparseTensorProto:
    values = helper.make_tensor("w", FLOAT, [3], [1.0, 2.0, 3.0])
    return helper.make_sparse_tensor(values, helper.make_tensor("i", 7, [3], [1, 9, 30]), dims)


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    model = parsed("(float[2,8] x) => (float[2,8] y) { y = MatMul(x, w) }")
    model.graph.sparse_initializer.append(sparse([8, 8]))
    feeds = feeds_for(model)
    dense = np.zeros(64, np.float32)
    dense[[1, 9, 30]] = [1.0, 2.0, 3.0]
    found = plain_outputs(optimized(model, tmp_path), feeds)
    assert_same(found, [feeds["x"] @ dense.reshape(8, 8)])


def test_a_sparse_weight_that_fits_nowhere_is_one_sentence(tmp_path: Path) -> None:
    model = parsed("(float[2] x) => (float[2] y) { y = Relu(x) }")
    model.graph.sparse_initializer.append(sparse([1 << 31, 1 << 31]))
    with pytest.raises(ModelError, match=r"'w' of shape .* fits into no memory"):
        loaded(model, tmp_path)


def test_a_sparse_weight_of_strings_is_one_sentence(tmp_path: Path) -> None:
    model = parsed("(float[2] x) => (float[2] y) { y = Relu(x) }")
    values = numpy_helper.from_array(np.array(["a"], object), "w")
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2]))
    with pytest.raises(ModelError, match="'w' holds strings"):
        loaded(model, tmp_path)


def test_a_sparse_weight_may_be_an_input_too(tmp_path: Path) -> None:
    model = parsed("(float[2,8] x, float[8,8] w) => (float[2,8] y) { y = MatMul(x, w) }")
    model.graph.sparse_initializer.append(sparse([8, 8]))
    assert [value.name for value in input_values(model)] == ["x"]
    assert loaded(model, tmp_path).bound_shapes == {"x": (2, 8)}


def test_notes_are_kept(tmp_path: Path) -> None:
    model = parsed("(float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }", ir_version=10)
    graph = model.graph
    graph.input[0].doc_string, graph.output[0].doc_string = "0 to 1", "logits"
    noted = (graph, graph.input[0], graph.output[0], graph.node[1])
    for number, what in enumerate(noted):
        what.metadata_props.add(key="key", value=str(number))
    graph.node[1].name = "last"
    graph.node[1].metadata_props.add(key="onnxsched.stream", value="99")
    graph.quantization_annotation.add(tensor_name="y")
    graph.quantization_annotation.add(tensor_name="gone")
    found = onnx.load(optimized(model, tmp_path, streams=1)).graph
    assert (found.input[0].doc_string, found.output[0].doc_string) == ("0 to 1", "logits")
    for number, what in enumerate((found, found.input[0], found.output[0], found.node[1])):
        kept = {note.key: note.value for note in what.metadata_props}
        assert kept["key"] == str(number)
        assert kept.get("onnxsched.stream", "0") == "0"
    assert [note.tensor_name for note in found.quantization_annotation] == ["y"]


def test_a_model_in_half_precision_may_differ_by_what_that_rounds(tmp_path: Path) -> None:
    """Cut into sessions, its operators are fused otherwise, and a step of float16 is much."""
    rng = np.random.default_rng(0)
    half = [numpy_helper.from_array((rng.standard_normal(s) * 0.3).astype(np.float16), n)
            for n, s in (("w", (16, 16)), ("c", (16,)), ("g", (16,)), ("b", (16,)))]  # fmt: skip
    model = parsed(
        """(float16[1,8,16] x) => (float16[1,8,16] y) {
            m = MatMul(x, w)
            n = Add(m, c)
            a = Add(x, n)
            o = LayerNormalization(a, g, b)
            f = MatMul(o, w)
            r = Relu(f)
            y = Add(r, o)
        }"""
    )
    model.graph.initializer.extend(half)
    optimized(model, tmp_path, policy="sequential", streams=1)
