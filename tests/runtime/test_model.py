"""Models are read whole, written whole, and cut into parts that equal the whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxsched_runtime import files
from onnxsched_runtime.errors import ModelError, OnnxschedError, UsageError
from onnxsched_runtime.files import (
    read_model,
    require_target,
    saved_by_ort,
    scratch_folder,
    write_model,
)
from onnxsched_runtime.model import name_nodes, node_reads, operations_from_model
from onnxsched_runtime.partition import plan_execution
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart, ModelSource
from support.models import (
    CPU,
    MODELS,
    Array,
    annotation_of,
    assert_same,
    branch,
    chain,
    feeds_for,
    large_weight,
    loop,
    model_of,
    optional_input,
    reference,
    tensor_types,
    weight,
)

Write = Callable[[onnx.ModelProto, Path], None]


def _saved_beside(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a model with its weights in `weights.data`."""
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.json", "model", "model.onnxtxt"):
        write_model(chain(), tmp_path / name)
        assert read_model(tmp_path / name) == chain()
        assert read_model(str(tmp_path / name)) == chain()


def test_external_data_is_read_too(tmp_path: Path) -> None:
    path = _saved_beside(chain(), tmp_path)
    assert (tmp_path / "weights.data").is_file()
    model = read_model(path)
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(model.graph.initializer[0]), weight(3)
    )


@pytest.mark.parametrize("name", ["none.onnx", "none/model.onnx", ".", "m" * 300])
def test_a_missing_file_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"There is no file '.*'; give the path of") as caught:
        read_model(tmp_path / name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"garbage", b"\0" * 50, b"", b"{}"])
@pytest.mark.parametrize("name", ["bad.onnx", "bad.json", "bad.textproto"])
def test_what_is_no_model_is_a_model_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=str(path)) as caught:
        read_model(path)
    assert caught.value.exit_code == 5
    assert str(caught.value).endswith(".")


def test_a_truncated_model_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(chain().SerializeToString()[:-7])
    with pytest.raises(ModelError, match="can't be read as an ONNX model"):
        read_model(path)


@pytest.mark.parametrize("left", [None, b"", b"1234"])
def test_missing_or_short_external_data_is_a_model_error(
    tmp_path: Path, left: bytes | None
) -> None:
    path = _saved_beside(chain(), tmp_path)
    data = tmp_path / "weights.data"
    data.unlink() if left is None else data.write_bytes(left)
    with pytest.raises(ModelError, match=f"The weights beside '{path}' can't be read") as caught:
        read_model(path)
    assert caught.value.exit_code == 5


def test_writing_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    write_model(chain(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert read_model(path) == chain()


def test_writing_goes_through_a_link(tmp_path: Path) -> None:
    link, path = tmp_path / "link.onnx", tmp_path / "model.onnx"
    link.symlink_to(path)
    write_model(chain(), link)
    assert link.is_symlink()
    assert read_model(path) == chain()


def test_a_model_above_the_limit_gets_a_file_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FILE_NBYTES", 1024)
    model, path = large_weight(), tmp_path / "model.onnx"
    write_model(model, path)
    assert model == large_weight()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 1024
    feeds = feeds_for(model)
    assert_same(reference(read_model(path), feeds), reference(model, feeds))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, tmp_path / "model.onnx.data"):
        file.rename(moved / file.name)
    assert_same(reference(read_model(moved / "model.onnx"), feeds), reference(model, feeds))


@pytest.mark.parametrize("name", ["none/model.onnx", "file/model.onnx", "", "m" * 300])
def test_where_no_file_can_be_is_an_error_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OnnxschedError, match=r"' can't be written \(.+\); choose another\.$"):
        write_model(chain(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OnnxschedError, match=f"'{pipe}' can't be written"):
        write_model(chain(), pipe)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("limit", [1024, 2**31])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_FILE_NBYTES", limit)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OnnxschedError) as caught:
        write_model(large_weight(), path)
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        f"'{path}' can't be written (No space left on device); choose another."
    )
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _says_no_room(error: OnnxschedError, place: Path) -> bool:
    return error.exit_code == 1 and str(error) == (
        f"There is no room in the temporary folder '{place}'; free some or set TMPDIR."
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_temporary_folder_is_called_that(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OnnxschedError) as caught, scratch_folder() as scratch:
        write_model(chain(), scratch / "model.onnx")
    assert _says_no_room(caught.value, Path(tempfile.gettempdir()))
    assert not scratch.exists()


@pytest.mark.parametrize("free", [0, 9, 10, 11])
def test_onnxruntimes_error_is_the_models_only_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int
) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(10))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    refusal = ModelError("ONNX Runtime refuses the model: Protobuf serialization failed.")
    with pytest.raises(OnnxschedError) as caught, saved_by_ort(tmp_path):
        raise refusal
    assert caught.value is refusal if free > 10 else _says_no_room(caught.value, tmp_path.parent)


def test_other_errors_pass_through_a_temporary_folder() -> None:
    with pytest.raises(UsageError, match="There is no file"), scratch_folder() as scratch:
        read_model(scratch / "none.onnx")


def test_no_temporary_folder_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(OnnxschedError, match=r"^No temporary folder can be made \(.*TMPDIR\.$"),
        scratch_folder(),
    ):
        pytest.fail("there is none")


def _reads(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    return {node.output[0]: node_reads(node) for node in model.graph.node}


def test_a_node_reads_what_its_subgraphs_capture() -> None:
    assert _reads(branch())["c"] == ("flag", "a", "bias", "b", "x")
    assert _reads(loop())["sum"] == ("count", "true", "x", "step")


def test_a_node_reads_through_subgraphs_of_subgraphs() -> None:
    model = model_of(
        """(bool p, bool q, float[3] x) => (float[3] y) {
            a = Relu(x)
            b = Neg(x)
            y = If(p) <
                then_branch = outer () => (float[3] u) {
                    own = Neg(b)
                    u = If(q) <
                        then_branch = one () => (float[3] v) { v = Add(own, a) },
                        else_branch = two () => (float[3] w) <float[3] own_weight = {1, 2, 3}> {
                            w = Add(own, own_weight)
                        }
                    >
                },
                else_branch = none () => (float[3] t) { t = Identity(x) }
            >
        }"""
    )
    assert sorted(_reads(model)["y"]) == ["a", "b", "p", "q", "x"]


def test_an_optional_input_left_out_is_not_read() -> None:
    assert _reads(optional_input())["b"] == ("a", "high")


def test_weights_are_no_reads_of_an_operation_and_order_is_the_launch_order() -> None:
    model = branch()
    annotation = annotation_of(model, (1, 2), order=(1, 0, 2, 3))
    operations = operations_from_model(model, annotation.placements, annotation.host_reasons)
    assert [o.name for o in operations] == ["Neg_1", "Relu_0", "If_2", "Sigmoid_3"]
    assert operations[2].reads == ("flag", "a", "b", "x")
    assert operations[2].writes == ("c",)
    assert operations[2].host_reason == "If decides at run time"
    assert operations[3].host_reason is None


def _beside(tensor: TensorProto) -> onnx.NodeProto:
    """A Constant of a tensor that lies in a file of its own."""
    tensor.data_type, tensor.data_location = TensorProto.FLOAT, TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return onnx.helper.make_node("Constant", [], ["c"], value=tensor)


@pytest.mark.parametrize("place", ["initializer", "constant", "branch", "function"])
def test_a_file_of_weights_is_no_target_wherever_they_are_used(place: str, tmp_path: Path) -> None:
    constant = _beside(TensorProto(name="w"))
    graph = onnx.GraphProto(name="g")
    model = onnx.helper.make_model(graph)
    if place == "initializer":
        model.graph.initializer.append(constant.attribute[0].t)
    elif place == "constant":
        model.graph.node.append(constant)
    elif place == "branch":
        branch = onnx.helper.make_graph([constant], "b", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch))
    else:
        model.functions.add(name="f").node.append(constant)
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    for name in ("weights", "other"):
        (tmp_path / name).touch()
    require_target("-o", tmp_path / "other", models=[tmp_path / "in.onnx"])
    require_target("-o", tmp_path / "weights", models=[tmp_path / "none.onnx"])
    with pytest.raises(UsageError, match="is a file that this command reads or writes"):
        require_target("-o", tmp_path / "weights", models=[tmp_path / "in.onnx"])


def _plan(model: onnx.ModelProto) -> tuple[ModelSource, ExecutionPlan]:
    annotation = annotation_of(model)
    operations = operations_from_model(model, annotation.placements, annotation.host_reasons)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    return ModelSource(model, annotation.tensors), plan_execution(operations, inputs, outputs)


def _run(part: ModelPart, feeds: dict[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
    with OrtSession(part, SessionSettings(CPU)) as session:
        return dict(zip(outputs, session.run(feeds, outputs), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_one_after_another_equal_the_whole(name: str) -> None:
    model = MODELS[name]()
    source, plan = _plan(model)
    feeds = feeds_for(model)
    values: dict[str, Any] = dict(feeds)
    for index in (i for piece in plan.pieces for i in piece.runs):
        segment = plan.segments[index]
        part = source.extract(segment)
        graph = onnx.load_model_from_string(part.content).graph
        assert tuple(value.name for value in graph.input) == segment.inputs
        assert tuple(value.name for value in graph.output) == segment.outputs
        assert not any(node.metadata_props for node in graph.node)
        values |= _run(part, {n: values[n] for n in segment.inputs}, segment.outputs)
    assert_same([values[name] for name in plan.outputs], reference(model, feeds))


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_known_shapes_are_valid_models(name: str) -> None:
    source, plan = _plan(MODELS[name]())
    for segment in plan.segments:
        types = [source.tensors.get(tensor) for tensor in (*segment.inputs, *segment.outputs)]
        part = source.extract(segment)
        if all(kind is not None and kind.is_static for kind in types) and not part.weights:
            onnx.checker.check_model(part.content, full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_as_one_part_is_the_model(name: str) -> None:
    model = MODELS[name]()
    feeds = feeds_for(model)
    outputs = tuple(value.name for value in model.graph.output)
    values = _run(ModelSource(model, tensor_types(model)).whole(), dict(feeds), outputs)
    assert_same([values[name] for name in outputs], reference(model, feeds))


@pytest.mark.parametrize("size", [3, 900])
def test_the_whole_returns_a_weight_that_nobody_reads(size: int) -> None:
    text = f"(float[3] x) => (float[3] y, float[{size}] w) {{ y = Relu(x) }}"
    model = model_of(text, w=weight(size))
    feeds = feeds_for(model)
    values = _run(ModelSource(model, tensor_types(model)).whole(), feeds, ("y", "w"))
    assert_same([values["y"], values["w"]], reference(model, feeds))


def test_extracting_leaves_the_model_as_it_was() -> None:
    model = large_weight()
    source, plan = _plan(model)
    for segment in plan.segments:
        source.extract(segment)
    assert model == large_weight()


def test_a_large_weight_goes_beside_the_bytes_once_for_all_parts() -> None:
    source, plan = _plan(large_weight())
    parts = [source.extract(segment) for segment in plan.segments]
    beside = [part.weights["table"] for part in parts if part.weights]
    assert len(beside) == 2
    assert beside[0] is beside[1]
    np.testing.assert_array_equal(beside[0], weight(32, 32))
    assert all(len(part.content) < 1024 for part in parts)


def test_a_part_takes_only_the_weights_it_uses() -> None:
    source = ModelSource(branch(), tensor_types(branch()))
    part = source.part(["Relu_0"], ["x"], ["a"])
    assert not onnx.load_model_from_string(part.content).graph.initializer
    part = source.part(["If_2"], ["flag", "a", "b", "x"], ["c"])
    (bias,) = onnx.load_model_from_string(part.content).graph.initializer
    assert bias.name == "bias"


@pytest.mark.parametrize(
    ("element_type", "beside"),
    [
        (TensorProto.FLOAT, True),
        (TensorProto.FLOAT16, True),
        (TensorProto.DOUBLE, True),
        (TensorProto.INT8, True),
        (TensorProto.UINT64, True),
        (TensorProto.BOOL, True),
        (TensorProto.BFLOAT16, False),
        (TensorProto.FLOAT8E4M3FN, False),
        (TensorProto.FLOAT8E5M2FNUZ, False),
        (TensorProto.INT4, False),
        (TensorProto.UINT4, False),
    ],
)
def test_large_weights_of_every_type_reach_the_session(element_type: int, beside: bool) -> None:
    content: Array = np.ones(4096, np.float32)
    model = model_of("(int64[4096] x) => (float[4096] y) { y = Cast<to = 1>(x) }")
    model.opset_import[0].version = 21
    model.graph.node[0].input[0] = "table"
    model.graph.initializer.append(onnx.helper.make_tensor("table", element_type, [4096], content))
    part = ModelSource(model, tensor_types(model)).part(["Cast_0"], [], ["y"])
    assert bool(part.weights) is beside
    np.testing.assert_array_equal(_run(part, {}, ("y",))["y"], content)


def test_strings_stay_in_the_bytes() -> None:
    model = model_of("(int64 at) => (string y) { y = Gather(words, at) }", words=weight(1))
    words = np.array([f"word {number}" for number in range(200)], object)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(words, "words"))
    part = ModelSource(model, {}).part(["Gather_0"], ["at"], ["y"])
    assert not part.weights
    assert _run(part, {"at": np.array(17)}, ("y",))["y"] == "word 17"


def test_names_that_are_unique_are_kept_wherever_they_stand() -> None:
    model = onnx.ModelProto()
    for name in ("a", "a", "a_1", "", "b"):
        model.graph.node.add(name=name, op_type="Relu", output=[f"t{len(model.graph.node)}"])
    name_nodes(model)
    assert [node.name for node in model.graph.node] == ["a", "a_2", "a_1", "Relu_t3", "b"]
