"""The annotation survives a round trip, and other tools; damage is told from it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from onnxsched_runtime.annotation import (
    Annotation,
    fingerprint,
    read_annotation,
    restore_annotation,
    strip_annotation,
    write_annotation,
)
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import AnnotationError
from onnxsched_runtime.load import Session
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.fused import kernels
from support.models import (
    MODELS,
    annotated,
    annotation_of,
    chain,
    data_dependent,
    diamond,
    feeds_for,
    fork_join,
    reference,
)

NHWC = Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic", fuses=True)
DEVICES = [Device("cpu"), Device("cuda"), Device("cuda", 1)]


def _json() -> SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    )


@st.composite
def schedules(draw: st.DrawFn, model: onnx.ModelProto) -> Annotation:
    """Any placement of the model's nodes, in any order."""
    names = draw(st.permutations([node.name for node in model.graph.node]))
    devices = draw(st.sampled_from([DEVICES[:1], DEVICES[1:]]))
    placements = st.builds(Placement, st.sampled_from(devices), st.integers(0, 40))
    shapes = st.none() | st.lists(st.integers(0, 9), max_size=4).map(tuple)
    types = st.builds(TensorType, st.sampled_from([1, 7, 9, 10]), shapes)
    return Annotation(
        placements={name: draw(placements) for name in names},
        tensors=draw(st.dictionaries(st.text(max_size=4), types, max_size=4)),
        host_reasons=draw(st.dictionaries(st.sampled_from(names), st.text(max_size=9))),
        variant=draw(st.sampled_from([DEFAULT_VARIANT, NHWC, Variant(tf32=False)])),
        kernels=draw(kernels()),
        details=draw(st.dictionaries(st.sampled_from(["policy", "times", "é"]), _json())),
    )


def _keys(holder: onnx.ModelProto | onnx.NodeProto) -> list[str]:
    return [entry.key for entry in holder.metadata_props]


def _drop_node_keys(node: onnx.NodeProto) -> None:
    del node.metadata_props[:]


def _set_node_key(node: onnx.NodeProto, key: str, value: str) -> None:
    (entry,) = (entry for entry in node.metadata_props if entry.key == f"onnxsched.{key}")
    entry.value = value


def _schedule(model: onnx.ModelProto) -> Any:
    (entry,) = (e for e in model.metadata_props if e.key == "onnxsched.schedule")
    return entry


@settings(deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_in_the_same_order(data: DataObject) -> None:
    model = diamond()
    annotation = data.draw(schedules(model))
    write_annotation(model, annotation)
    model = onnx.load_model_from_string(model.SerializeToString())
    read = read_annotation(model)
    assert read == annotation
    assert list(read.placements) == list(annotation.placements)


def test_shapes_that_are_not_known_and_the_first_stream_survive() -> None:
    model = data_dependent()
    annotation = annotation_of(model, (0, 1))
    write_annotation(model, annotation)
    assert None in {kind.shape for kind in annotation.tensors.values()}
    assert read_annotation(model) == annotation
    for node in model.graph.node:
        _drop_node_keys(node)
    assert read_annotation(model) == annotation


def test_node_keys_say_where_and_when() -> None:
    model = annotated(diamond(), (4, 0), device=Device("cuda", 1), order=(0, 2, 1, 3))
    assert [{e.key: e.value for e in node.metadata_props} for node in model.graph.node] == [
        {"onnxsched.device": "cuda:1", "onnxsched.stream": stream, "onnxsched.order": order}
        for stream, order in (("4", "0"), ("4", "2"), ("0", "1"), ("0", "3"))
    ]


def test_writing_again_leaves_each_key_once_and_other_keys_alone() -> None:
    model = annotated(diamond())
    for holder in (model, *model.graph.node):
        holder.metadata_props.add(key="other.tool", value="kept")
    annotation = annotation_of(model, (9, 8))
    write_annotation(model, annotation)
    assert read_annotation(model) == annotation
    for holder in (model, *model.graph.node):
        assert len(set(_keys(holder))) == len(_keys(holder))
        assert "other.tool" in _keys(holder)


def test_strip_removes_every_key_and_says_whether_there_was_one() -> None:
    model, untouched = diamond(), diamond()
    model.metadata_props.add(key="other.tool", value="kept")
    untouched.metadata_props.add(key="other.tool", value="kept")
    annotated(model)
    assert strip_annotation(model) is True
    assert model == untouched
    assert strip_annotation(model) is False
    assert model == untouched


def test_strip_finds_keys_that_are_left_on_one_node_only() -> None:
    model = annotated(diamond())
    del model.metadata_props[:]
    for node in list(model.graph.node)[1:]:
        _drop_node_keys(node)
    assert strip_annotation(model) is True
    assert model == diamond()


@settings(deadline=None)
@given(lost=st.sets(st.integers(0, 3)))
def test_dropped_node_keys_are_read_from_the_table_and_restored(lost: set[int]) -> None:
    model = annotated(diamond())
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for index in lost:
        _drop_node_keys(model.graph.node[index])
    assert read_annotation(model) == read_annotation(whole)
    assert restore_annotation(model) == len(lost)
    assert model == whole
    assert restore_annotation(model) == 0


@pytest.mark.parametrize("key", ["device", "stream", "order"])
def test_a_node_that_lost_one_key_has_lost_its_keys(key: str) -> None:
    model = annotated(diamond())
    node = model.graph.node[2]
    kept = [entry for entry in node.metadata_props if entry.key != f"onnxsched.{key}"]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    assert restore_annotation(model) == 1
    assert model == annotated(diamond())


def test_node_keys_edited_by_hand_win() -> None:
    model = annotated(diamond(), (1,), device=Device("cuda"))
    _, left, right, _ = model.graph.node
    _set_node_key(left, "stream", "7")
    _set_node_key(left, "order", "2")
    _set_node_key(right, "device", "cuda:3")
    _set_node_key(right, "order", "1")
    read = read_annotation(model)
    assert list(read.placements) == ["Neg_0", right.name, left.name, "Add_3"]
    assert read.placements[left.name] == Placement(Device("cuda"), 7)
    assert read.placements[right.name] == Placement(Device("cuda", 3), 1)
    assert read.devices == (Device("cuda"), Device("cuda", 3))


@settings(deadline=None)
@given(order=st.permutations(range(4)))
def test_the_fingerprint_does_not_see_the_order_of_nodes(order: list[int]) -> None:
    model = diamond()
    nodes = [model.graph.node[i] for i in order]
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    assert fingerprint(shuffled) == fingerprint(model)


def test_the_fingerprint_does_not_see_the_order_of_attributes() -> None:
    model = fork_join()
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    before = fingerprint(model)
    attributes = list(pool.attribute)[::-1]
    assert len(attributes) == 2
    del pool.attribute[:]
    pool.attribute.extend(attributes)
    assert fingerprint(model) == before


def test_the_fingerprint_does_not_see_weights_nor_annotations() -> None:
    model = chain()
    before = fingerprint(model)
    model.graph.initializer[0].raw_data = np.zeros(3, np.float32).tobytes()
    assert fingerprint(annotated(model)) == before


def test_the_fingerprint_sees_every_node_and_edge() -> None:
    def changed(field: str) -> onnx.ModelProto:
        model = diamond()
        node = model.graph.node[3]
        match field:
            case "name":
                node.name = "other"
            case "operator":
                node.op_type = "Mul"
            case "domain":
                node.domain = "com.microsoft"
            case "edge":
                node.input[1] = "top"
            case "edge order":
                node.input[:] = ["right", "left"]
            case "outputs exchanged":
                model.graph.node[1].output[0], model.graph.node[2].output[0] = "right", "left"
            case "output":
                model.graph.output[0].name = "left"
            case "node":
                model.graph.node.add(op_type="Neg", input=["y"], output=["z"])
        return model

    fields = [
        "none", "name", "operator", "domain", "edge", "edge order", "outputs exchanged", "output",
        "node",
    ]  # fmt: skip
    assert len({fingerprint(changed(field)) for field in fields}) == len(fields)


@pytest.mark.parametrize("name", MODELS)
def test_an_annotated_model_is_an_onnx_model_with_the_same_outputs(name: str) -> None:
    model = MODELS[name]()
    feeds = feeds_for(model)
    expected = reference(model, feeds)
    annotated(model)
    onnx.checker.check_model(model, full_check=True)
    for one, other in zip(reference(model, feeds), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_schedule_must_name_exactly_the_nodes() -> None:
    model = diamond()
    with pytest.raises(AnnotationError, match="does not name exactly the model's nodes"):
        write_annotation(model, annotation_of(chain()))
    annotation = annotation_of(model)
    model.graph.node.add(op_type="Neg", input=["y"], output=["z"], name=model.graph.node[0].name)
    with pytest.raises(AnnotationError, match="does not name exactly the model's nodes"):
        write_annotation(model, annotation)
    assert not _keys(model)


def _refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(AnnotationError) as caught:
        read_annotation(model)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_a_model_without_a_schedule_is_told_to_be_optimized() -> None:
    assert _refusal(diamond()) == (
        "The model carries no onnxsched schedule; run `onnxsched optimize` on it first."
    )


def test_another_schema_version_is_named() -> None:
    model = annotated(diamond())
    (entry,) = (e for e in model.metadata_props if e.key == "onnxsched.schema")
    entry.value = "2"
    message = _refusal(model)
    assert "schema version 2 and this release reads version 1" in message
    assert message.endswith("run `onnxsched optimize` again.")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "{}", '"nodes"', '{"nodes":[]}', "[" * 100_000]
)
def test_damaged_json_is_refused(text: str) -> None:
    model = annotated(diamond())
    _schedule(model).value = text
    message = _refusal(model)
    assert message.startswith("The schedule of the model is damaged (")
    assert message.endswith("run `onnxsched optimize` again.")


@settings(deadline=None)
@given(data=st.data())
def test_a_table_with_any_field_damaged_is_refused_or_read(data: DataObject) -> None:
    model = annotated(diamond())
    content = json.loads(_schedule(model).value)
    holder, key = data.draw(st.sampled_from(_fields(content)))
    holder[key] = data.draw(_json() | st.floats())
    _schedule(model).value = json.dumps(content)
    for node in model.graph.node:
        _drop_node_keys(node)
    with suppress(AnnotationError):
        read = read_annotation(model)
        assert sorted(read.placements) == sorted(node.name for node in model.graph.node)


def _fields(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its holder and the key in it."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    return [
        place
        for key in keys
        for place in (
            (content, key),
            *(_fields(content[key]) if isinstance(content[key], dict | list) else ()),
        )
    ]


def test_the_variant_is_written_field_by_field_and_survives_a_restoration() -> None:
    model = diamond()
    write_annotation(model, replace(annotation_of(model), variant=NHWC))
    assert json.loads(_schedule(model).value)["variant"] == {
        "layout": "nhwc", "fuse_conv_bias": True, "conv_search": "heuristic", "fuses": True,
        "tf32": True,
    }  # fmt: skip
    _drop_node_keys(model.graph.node[1])
    assert restore_annotation(model) == 1
    assert read_annotation(model).variant == NHWC


def test_a_file_without_a_variant_has_the_default() -> None:
    model = annotated(diamond())
    content = json.loads(_schedule(model).value)
    del content["variant"]
    _schedule(model).value = json.dumps(content)
    assert read_annotation(model).variant == DEFAULT_VARIANT


@pytest.mark.parametrize(
    "variant",
    [
        None, [], "", "nhwc", 1, {"layout": "nchwc"}, {"tf32": 0}, {"fuses": 0},
        {"conv_search": None},
    ],
)  # fmt: skip
def test_a_damaged_variant_is_refused(variant: Any) -> None:
    _assert_refused("variant", variant)


def _assert_refused(entry: str, damaged: Any) -> None:
    model = annotated(diamond())
    content = json.loads(_schedule(model).value)
    content[entry] = damaged
    _schedule(model).value = json.dumps(content)
    message = _refusal(model)
    assert message.startswith("The schedule of the model is damaged (")
    assert message.endswith("run `onnxsched optimize` again.")


def test_a_file_without_kernels_has_none() -> None:
    model = annotated(diamond())
    content = json.loads(_schedule(model).value)
    assert content.pop("kernels") == []
    _schedule(model).value = json.dumps(content)
    assert read_annotation(model).kernels == {}


@pytest.mark.parametrize("damaged", [None, 1, "conv", [1], [[[1, 2], [[3]]]], [[[], None]]])
def test_damaged_kernels_are_refused(damaged: Any) -> None:
    _assert_refused("kernels", damaged)


@pytest.mark.parametrize(
    "damaged",
    [
        [99, [1]], [0, [1]], [-1, None], [1.0, [1]], [1, [-1, 2]], [1, [10**20]], [1, [1.5]],
        [1, "12"], [1, [2**62, 4]], [1, [2**62, 4, 0]],
    ],
)  # fmt: skip
def test_a_damaged_tensor_type_is_refused(damaged: Any) -> None:
    _assert_refused("tensors", {"x": damaged})


@pytest.mark.parametrize("stream", [-1, 2**63, 1.5, True, None, "x"])
def test_a_damaged_stream_is_refused(stream: Any) -> None:
    names = [node.name for node in diamond().graph.node]
    _assert_refused("nodes", [[name, "cpu:0", stream] for name in names])


@pytest.mark.parametrize("damaged", [None, [], {"x": None}, {"x": [1.5]}, {"x": [-1]}, {"x": 2}])
def test_damaged_shapes_are_refused(damaged: Any) -> None:
    _assert_refused("bound_shapes", damaged)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("null", "it is no JSON object"),
        ("{}", "field 'nodes' is missing"),
        ('{"nodes":null}', "field 'nodes' is not as onnxsched writes it"),
        ('{"nodes":[["a"]]}', "field 'nodes' is not as onnxsched writes it"),
    ],
)
def test_damage_is_told_in_words(text: str, words: str) -> None:
    model = annotated(diamond())
    _schedule(model).value = text
    assert _refusal(model) == (
        f"The schedule of the model is damaged ({words}); run `onnxsched optimize` again."
    )


@pytest.mark.parametrize("order", ["0", "4", "9"])
def test_launch_positions_that_are_not_each_there_once_are_damage(order: str) -> None:
    model = annotated(diamond())
    _set_node_key(model.graph.node[2], "order", order)
    assert "(its nodes have not each one of the launch positions 0 to 3); run" in _refusal(model)


def test_a_schedule_over_devices_of_two_kinds_is_damage() -> None:
    model = annotated(diamond())
    _set_node_key(model.graph.node[2], "device", "cuda:0")
    reason = "it uses cpu:0, cuda:0, and GPUs and the CPU can't share a model"
    assert reason in _refusal(model)


def test_on_the_cpu_the_variant_is_ignored() -> None:
    model = MODELS["fork_join"]()
    annotation = annotation_of(model)
    feeds = feeds_for(model)
    with (
        Session(model, replace(annotation, variant=NHWC)) as session,
        Session(model, annotation) as plain,
    ):
        assert session.plan == plain.plan
        np.testing.assert_array_equal(session.run(None, feeds)[0], plain.run(None, feeds)[0])


@pytest.mark.parametrize("instead", [[], [["stranger", "cpu:0", 1]]])
def test_a_table_that_leaves_a_node_out_is_refused(instead: list[Any]) -> None:
    model = annotated(diamond())
    content = json.loads(_schedule(model).value)
    content["nodes"][1:2] = instead
    _schedule(model).value = json.dumps(content)
    assert "does not name exactly the model's nodes" in _refusal(model)


def test_a_schedule_of_another_graph_is_refused() -> None:
    model = annotated(diamond())
    model.graph.node[3].op_type = "Mul"
    message = _refusal(model)
    assert "was made for another graph" in message
    assert message.endswith("run `onnxsched optimize` again.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stream", "two"),
        ("order", ""),
        ("order", "-1"),
        ("order", "1.0"),
        ("device", "tpu:0"),
        ("stream", "1.5"),
        ("stream", "-1"),
        ("stream", str(2**63)),
    ],
)
def test_a_damaged_node_key_is_refused_by_the_name_of_the_node(key: str, value: str) -> None:
    model = annotated(diamond())
    _set_node_key(model.graph.node[2], key, value)
    message = _refusal(model)
    assert message.startswith("The schedule of the model is damaged (node 'Sigmoid_2': ")
    assert message.endswith("run `onnxsched optimize` again.")
