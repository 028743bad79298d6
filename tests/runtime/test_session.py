"""What ONNX Runtime says reaches the user without its codes, its source lines and our files."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxsched_runtime import calling, cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.session import OrtSession, to_float16
from onnxsched_runtime.session.binding import complaint
from onnxsched_runtime.session.creating import session_options
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.tensor import TensorType
from sample_models import build

CPU = Device("cpu")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Error in execution: [with ERRTYPE = cudaError; bool "
            "THRW = true] CUDA failure 901: operation failed ; GPU=0 ; hostname=vm ; "
            "file=/onnxruntime_src/x.cc ; line=61 ; expr=cudaStreamEndCapture(stream_, &graph);",
            "Error in execution: CUDA failure 901: operation failed",
        ),
        (
            "[ONNXRuntimeError] : 10 : INVALID_GRAPH : Load model from /tmp/a/b.onnx failed:This "
            "is an invalid model.",
            "This is an invalid model",
        ),
    ],
)
def test_codes_and_source_lines_are_left_out(said: str, shown: str) -> None:
    assert complaint(RuntimeError(said)) == shown


def test_a_model_that_is_refused_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"^ONNX Runtime refuses the model: [^\n]*\.$"):
        OrtSession(path, SessionSettings(CPU))


@pytest.mark.parametrize(("name", "is_there"), [("ops.so", True), ("libops.so", False)])
def test_a_library_in_this_folder_is_found_and_others_are_left_to_the_system(
    name: str, is_there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def register_custom_ops_library(self, library: str) -> None:
            asked.append(library)

    (tmp_path / "ops.so").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    session_options(SessionSettings(CPU, custom_ops=(name,)))
    assert asked == [str(tmp_path / name) if is_there else name]


def test_the_types_of_outputs_are_what_ort_infers(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("NonZero", ["x"], ["n"]),
            helper.make_node("SequenceConstruct", ["x"], ["q"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_empty_tensor_value_info(name) for name in "snq"],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "in.onnx")
    with OrtSession(tmp_path / "in.onnx", SessionSettings(CPU)) as opened:
        assert opened.output_types() == {
            "s": TensorType(TensorProto.INT64, (2,)),
            "n": TensorType(TensorProto.INT64, None),
        }


def test_half_precision_keeps_inputs_and_outputs_and_comes_near(tmp_path: Path) -> None:
    model = build("squeezenet", image=48)
    before = model.SerializeToString()
    half = to_float16(model)
    assert model.SerializeToString() == before
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)
    kinds = {weight.data_type for weight in half.graph.initializer}
    assert TensorProto.FLOAT16 in kinds
    assert TensorProto.FLOAT not in kinds
    image = np.random.default_rng(0).standard_normal((1, 3, 48, 48)).astype(np.float32)
    results = []
    for number, proto in enumerate((model, half)):
        onnx.save(proto, tmp_path / f"{number}.onnx")
        with OrtSession(tmp_path / f"{number}.onnx", SessionSettings(CPU)) as opened:
            results.append(opened.run({model.graph.input[0].name: image})[0])
    gap = np.linalg.norm(results[0] - results[1]) / np.linalg.norm(results[0])
    assert 0 < gap < 1e-2


def test_every_gpu_but_the_first_is_used_in_one_thread_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Device] = []
    monkeypatch.setattr(calling, "_first_gpu", [])
    monkeypatch.setattr(cuda, "make_current", made.append)
    calling._thread_of.cache_clear()
    devices = [Device("cuda", 1), Device("cuda", 0), Device("cpu"), Device("cuda", 2)]
    seen = [calling.called(device, threading.get_ident) for device in devices * 2]
    here = threading.get_ident()
    assert seen[:4] == seen[4:]
    assert [ident == here for ident in seen[:4]] == [True, False, True, False]
    assert len(set(seen)) == 3
    assert made == [Device("cuda", 0), Device("cuda", 2)]
    with pytest.raises(ValueError, match="invalid literal"):
        calling.called(Device("cuda", 2), int, "x")
    calling._thread_of.cache_clear()


def test_what_runs_in_the_thread_of_a_gpu_may_use_that_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when garbage is collected there, with a session in it."""
    monkeypatch.setattr(calling, "_first_gpu", [Device("cuda", 0)])
    monkeypatch.setattr(cuda, "make_current", lambda device: None)
    calling._thread_of.cache_clear()
    other = Device("cuda", 7)
    inner = calling.called(other, calling.called, other, threading.get_ident)
    assert inner == calling.called(other, threading.get_ident)
    calling._thread_of.cache_clear()


def test_a_session_can_be_closed_when_the_thread_of_its_gpu_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx.save(build("tiny"), tmp_path / "tiny.onnx")
    opened = OrtSession(tmp_path / "tiny.onnx", SessionSettings(CPU))
    other = Device("cuda", 7)
    opened._device = other
    monkeypatch.setattr(calling, "_first_gpu", [Device("cuda", 0)])
    monkeypatch.setattr(cuda, "make_current", lambda device: None)
    monkeypatch.setattr(cuda, "synchronize", lambda device: None)
    calling._thread_of.cache_clear()
    calling._thread_of(other).shutdown()
    opened.close()
    assert opened._session is None
    calling._thread_of.cache_clear()


@pytest.mark.parametrize("has_run", [True, False])
def test_a_session_on_a_gpu_waits_for_what_it_has_launched_before_it_is_freed(
    has_run: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx.save(build("tiny"), tmp_path / "tiny.onnx")
    opened = OrtSession(tmp_path / "tiny.onnx", SessionSettings(CPU))
    gpu = Device("cuda", 0)
    opened._device, opened._is_fresh = gpu, not has_run
    monkeypatch.setattr(calling, "_first_gpu", [gpu])
    seen: list[tuple[Device, bool]] = []
    monkeypatch.setattr(
        cuda, "synchronize", lambda device: seen.append((device, opened._session is None))
    )
    opened.close()
    assert seen == ([(gpu, False)] if has_run else [])
    assert opened._session is None
