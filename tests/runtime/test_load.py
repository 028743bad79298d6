"""An annotated file runs like the model it was made of, and refuses what does not fit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import (
    AnnotationError,
    DeviceError,
    ModelError,
    OnnxschedError,
    UsageError,
)
from onnxsched_runtime.execution import multiplies_matrices
from onnxsched_runtime.executors.threads import ThreadExecutor
from onnxsched_runtime.files import write_model
from onnxsched_runtime.load import Session, load, moved
from onnxsched_runtime.model import node_reads
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.tensor import TensorType
from support import models
from support.models import (
    MODELS,
    annotated,
    annotation_of,
    assert_same,
    chain,
    diamond,
    feeds_for,
    fork_join,
    model_of,
    plain_session,
    random_models,
    read_output,
    reference,
    two_towers,
)
from support.plans import topological_orders

GPU = Device("cuda")

Feeds = Mapping[str, Any]


@pytest.fixture
def towers() -> Iterator[Session]:
    with Session(two_towers(), annotation_of(two_towers(), (1, 2))) as session:
        yield session


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "annotated.onnx"
    write_model(model, path)
    return path


def _needs(model: onnx.ModelProto) -> list[list[int]]:
    nodes = model.graph.node
    writer = {tensor: index for index, node in enumerate(nodes) for tensor in node.output}
    return [[writer[t] for t in node_reads(node) if t in writer] for node in nodes]


@pytest.mark.parametrize("streams", [(0,), (1, 2), (3, 1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_runs_like_plain_ort(name: str, streams: tuple[int, ...], tmp_path: Path) -> None:
    model = MODELS[name]()
    with load(_saved(annotated(model, streams), tmp_path)) as session:
        for seed in range(3):
            feeds = feeds_for(model, seed)
            assert_same(session.run(None, feeds), reference(model, feeds))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_schedule_of_any_model_runs_like_plain_ort(data: DataObject) -> None:
    model = data.draw(random_models() | st.sampled_from(list(MODELS.values())).map(_built))
    count = len(model.graph.node)
    streams = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(topological_orders(_needs(model)))
    with Session(model, annotation_of(model, streams, order=order)) as session:
        feeds = feeds_for(model, data.draw(st.integers(0, 9)))
        assert_same(session.run(None, feeds), reference(model, feeds))


def _built(builder: Any) -> onnx.ModelProto:
    model: onnx.ModelProto = builder()
    return model


def test_fifty_runs_with_changing_inputs_stay_right() -> None:
    model = fork_join()
    plain = plain_session(model)
    with Session(model, annotation_of(model)) as session:
        for seed in range(50):
            feeds = feeds_for(model, seed)
            assert_same(session.run(None, feeds), plain.run(None, feeds))


@pytest.mark.timeout(60, method="thread")
def test_what_can_not_be_copied_or_waited_for_is_wrong_usage(tmp_path: Path) -> None:
    model = MODELS["diamond"]()
    with Session(model, annotation_of(model)) as session:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="can't be copied or pickled; load"):
                attempt(session)
    for timeout_s in (0.0, -1.0, float("nan"), 1e12):
        with pytest.raises(UsageError, match="is no time that can be waited for"):
            load(tmp_path / "none.onnx", process_group=object(), timeout_s=timeout_s)


def test_names_of_outputs_may_come_from_anywhere() -> None:
    model = MODELS["diamond"]()
    feeds = feeds_for(model)
    with Session(model, annotation_of(model)) as session:
        names = [value.name for value in session.get_outputs()]
        expected = session.run(None, feeds)
        assert_same(session.run(iter(names), feeds), expected)  # type: ignore[arg-type]
        assert_same(session.run(np.array(names), feeds), expected)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"in a list: \['y'\]"):
            session.run("y", feeds)


def test_threads_may_call_one_session_at_once() -> None:
    model = fork_join()
    plain = plain_session(model)
    with Session(model, annotation_of(model)) as session, ThreadPoolExecutor(4) as callers:

        def check(seed: int) -> None:
            feeds = feeds_for(model, seed)
            assert_same(session.run(None, feeds), plain.run(None, feeds))

        list(callers.map(check, range(80)))


def test_calls_of_one_session_take_turns(towers: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    running = threading.Semaphore(1)
    real = ThreadExecutor.run

    def run(self: ThreadExecutor, feeds: Feeds, outputs: Sequence[str]) -> list[Any]:
        assert running.acquire(blocking=False)
        time.sleep(0.005)
        results = real(self, feeds, outputs)
        running.release()
        return results

    monkeypatch.setattr(ThreadExecutor, "run", run)
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda _: towers.run(None, ZEROS), range(12)))


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_outputs_are_described_as_by_ort(name: str) -> None:
    model = MODELS[name]()
    plain = plain_session(model)
    with Session(model, annotation_of(model)) as session:
        for ours, theirs in (
            (session.get_inputs(), plain.get_inputs()),
            (session.get_outputs(), plain.get_outputs()),
        ):
            assert [(a.name, a.type) for a in ours] == [(a.name, a.type) for a in theirs]
            assert [a.shape for a in ours] == [_known_shape(a) for a in theirs]


def _known_shape(argument: Any) -> list[int] | None:
    static = all(isinstance(size, int) for size in argument.shape)
    return argument.shape if static and argument.type.startswith("tensor") else None


@pytest.mark.parametrize(
    "kind",
    ["tensor(float)", "tensor(float16)", "tensor(bool)", "tensor(string)"],
)
def test_an_element_type_is_named_as_by_ort(kind: str) -> None:
    text = f"({kind[7:-1]}[2] x) => ({kind[7:-1]}[2] y) {{ y = Identity(x) }}"
    model = model_of(text)
    with Session(model, annotation_of(model)) as session:
        assert session.get_inputs()[0].type == plain_session(model).get_inputs()[0].type == kind


def test_inputs_that_are_weights_are_not_asked_for() -> None:
    model = chain()
    model.graph.input.append(onnx.helper.make_tensor_value_info("bias", 1, [3]))
    feeds = {"x": feeds_for(model)["x"]}
    with Session(model, annotation_of(model)) as session:
        assert [argument.name for argument in session.get_inputs()] == ["x"]
        assert_same(session.run(None, feeds), reference(model, feeds))


def test_outputs_come_as_named_and_in_that_order() -> None:
    model = read_output()
    feeds = feeds_for(model)
    a, b, c = reference(model, feeds)
    with Session(model, annotation_of(model)) as session:
        assert_same(session.run(["c", "a"], feeds), [c, a])
        assert_same(session.run(["b"], feeds), [b])
        assert_same(session.run(["b", "b"], feeds), [b, b])
        assert_same(session.run([], feeds), [a, b, c])


def test_a_call_takes_positions_and_returns_a_value_or_a_tuple(towers: Session) -> None:
    feeds = feeds_for(two_towers())
    outputs = towers(feeds["left"], feeds["right"])
    assert isinstance(outputs, tuple)
    assert_same(outputs, reference(two_towers(), feeds))
    with Session(diamond(), annotation_of(diamond())) as session:
        x = feeds_for(diamond())["x"]
        assert_same([session(x)], reference(diamond(), {"x": x}))
    with pytest.raises(UsageError, match=r"takes 2 inputs \['left', 'right'\], got 1"):
        towers(feeds["left"])


def test_inputs_may_be_lists_strided_arrays_and_torch_tensors(towers: Session) -> None:
    feeds = feeds_for(two_towers())
    expected = reference(two_towers(), feeds)
    wide = np.repeat(feeds["left"], 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous
    assert_same(towers(wide, torch.from_numpy(feeds["right"])), expected)
    assert_same(towers(wide, torch.from_numpy(feeds["right"]).requires_grad_()), expected)
    assert_same(towers(list(feeds["left"]), feeds["right"]), expected)


ZEROS = {"left": np.zeros((2, 3), np.float32), "right": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (
            {"left": ZEROS["left"]},
            "Input 'right' is missing; the model takes ['left', 'right'].",
        ),
        (
            {**ZEROS, "up": ZEROS["left"]},
            "There is no input 'up'; the model takes ['left', 'right'].",
        ),
        (
            {**ZEROS, "right": np.zeros(5, np.float32)},
            "Input 'right' takes shape [4], got [5]; the schedule is made for one shape, so "
            "optimize again for another (--shape).",
        ),
        (
            {**ZEROS, "left": np.zeros((3, 2), np.float32)},
            "Input 'left' takes shape [2, 3], got [3, 2]; the schedule is made for one shape, so "
            "optimize again for another (--shape).",
        ),
        (
            {**ZEROS, "right": np.zeros(4)},
            "Input 'right' takes float32, got float64; convert it.",
        ),
        ({**ZEROS, "right": [1, 2, 3, 4]}, "Input 'right' takes float32, got int64; convert it."),
        (
            {**ZEROS, "right": np.zeros(4, ">f4")},
            "Input 'right' takes float32, got float32 of another byte order; convert it.",
        ),
        (
            {**ZEROS, "left": torch.zeros(2, 3, device="meta")},
            "Input 'left' can't be read (Cannot copy out of meta tensor; no data!).",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_refused_in_a_sentence(
    towers: Session, feeds: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        towers.run(None, feeds)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2
    towers.run(None, ZEROS)


@pytest.mark.parametrize("strange", [np.zeros((3, 2), np.float32), np.zeros((2, 3))])
def test_an_only_input_that_does_not_fit_is_refused(strange: np.ndarray) -> None:
    with Session(diamond(), annotation_of(diamond())) as session:
        session.run(None, feeds_for(diamond()))
        with pytest.raises(UsageError, match=r"^Input 'x' takes"):
            session.run(None, {"x": strange})


def test_strings_are_taken_as_numpy_has_them_and_bytes_and_numbers_are_refused() -> None:
    model = models.model_of("(string[2] x) => (string[2] y) { y = Identity(x) }")
    with Session(model, annotation_of(model)) as session:
        for fitting in (np.array(["a", "ü"]), np.array(["a", "ü"], object), ["a", "ü"]):
            assert session(fitting).tolist() == ["a", "ü"]
        for strange, name in ((np.array([1, 2]), "int64"), (np.array([b"a", b"b"]), "bytes8")):
            with pytest.raises(UsageError, match=f"^Input 'x' takes strings, got {name}; conv"):
                session(strange)


def test_what_is_no_array_is_refused_in_a_sentence(towers: Session) -> None:
    with pytest.raises(UsageError, match=r"^Input 'left' can't be read \(.*\)\.$"):
        towers.run(None, {**ZEROS, "left": [[1.0, 2.0], [3.0]]})


def test_an_unknown_output_is_refused_by_name(towers: Session) -> None:
    with pytest.raises(UsageError, match=r"There is no output '1'; there are"):
        towers.run([1, "z"], ZEROS)  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"There is no output 'z'; there are \['p', 'q'\]\."):
        towers.run(["p", "z"], ZEROS)


def test_run_options_may_be_given_if_they_are_none(towers: Session) -> None:
    for session in (towers, models.plain_session(two_towers())):
        assert len(session.run(None, ZEROS, None)) == 2
    with pytest.raises(UsageError, match=r"has no options for a single run; leave run_options"):
        towers.run(None, ZEROS, onnxruntime.RunOptions())


def test_a_way_to_capture_that_there_is_not_is_refused(tmp_path: Path) -> None:
    path = _saved(annotated(fork_join()), tmp_path)
    with pytest.raises(UsageError, match="no capture 'all'; there are whole, ort, none"):
        load(path, capture="all")  # type: ignore[arg-type]


def test_a_schedule_for_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    model = fork_join()
    path = _saved(annotated(model, device=GPU), tmp_path)
    feeds = feeds_for(model)
    with load(path, device_map={"cuda:0": "cpu:0"}) as session:
        assert session.device == Device("cpu")
        assert len({segment.placement for segment in session.plan.segments}) == 3
        assert_same(session.run(None, feeds), reference(model, feeds))
    with load(path, device_map={"cuda": "cpu"}) as session:
        assert_same(session.run(None, feeds), reference(model, feeds))


def test_what_no_array_holds_is_refused_where_segments_hand_it_over() -> None:
    model = models.model_of(
        """(float[2] x) => (float[2] y) {
            narrow = Cast<to = 16>(x)
            wide = Cast<to = 1>(narrow)
            y = Neg(wide)
        }"""
    )
    with Session(model, annotation_of(model, (0, 0, 1))) as session:
        assert session(np.ones(2, np.float32)).tolist() == [-1.0, -1.0]
    with pytest.raises(ModelError) as caught:
        Session(model, annotation_of(model, (0, 1)))
    message = "'narrow' is a bfloat16[2], which can't be run on the CPU; use a GPU."
    assert str(caught.value) == message


def test_the_cpu_captures_nothing(towers: Session) -> None:
    assert (towers.capture, towers.refusal) == ("none", None)


def test_a_gpu_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = _saved(annotated(diamond(), device=Device("cuda", 99)), tmp_path)
    with pytest.raises(DeviceError) as caught:
        load(path)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith("Device cuda:99 is not available: this machine has ")
    assert message.endswith("; `onnxsched doctor` says more.")


def test_devices_can_be_exchanged_by_the_map() -> None:
    one, other = Device("cuda", 0), Device("cuda", 1)
    annotation = Annotation({"a": Placement(one, 1), "b": Placement(other, 2)}, {}, {})
    exchanged = moved(annotation, {"cuda:0": "cuda:1", "cuda:1": "cuda:0"})
    assert exchanged.placements == {"a": Placement(other, 1), "b": Placement(one, 2)}
    assert moved(annotation, {}) == annotation


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"cuda:1": "cpu"}, "The schedule does not use cuda:1; it uses cpu:0."),
        ({"cpu": "gpu"}, "'gpu' is no device: write cpu, cuda or cuda:INDEX."),
        ({"first": "cpu"}, "'first' is no device: write cpu, cuda or cuda:INDEX."),
    ],
)
def test_a_device_map_that_does_not_fit_is_refused(
    tmp_path: Path, device_map: Mapping[str, str], message: str
) -> None:
    path = _saved(annotated(diamond()), tmp_path)
    with pytest.raises(UsageError) as caught:
        load(path, device_map=device_map)
    assert str(caught.value) == message


def test_a_schedule_over_devices_of_two_kinds_is_refused_by_name() -> None:
    model = diamond()
    names = [node.name for node in model.graph.node]
    devices = (Device("cpu"), Device("cuda"))
    placements = {n: Placement(devices[i % 2], 0) for i, n in enumerate(names)}
    with pytest.raises(UsageError, match=r"uses cpu:0, cuda:0; GPUs and the CPU can't share"):
        Session(model, Annotation(placements, annotation_of(model).tensors, {}))


def test_what_can_not_be_loaded_is_told_by_the_right_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        load(tmp_path / "none.onnx")
    with pytest.raises(AnnotationError, match="carries no onnxsched schedule"):
        load(_saved(diamond(), tmp_path))
    with pytest.raises(AnnotationError, match="is launched before"):
        load(_saved(annotated(diamond(), order=(3, 2, 1, 0)), tmp_path))


def test_a_model_that_ort_refuses_is_a_model_error_in_one_line() -> None:
    model = diamond()
    model.graph.node[1].op_type = "Nonesuch"
    with pytest.raises(ModelError, match=r"^ONNX Runtime refuses the model: .*Nonesuch") as caught:
        Session(model, annotation_of(model))
    assert "\n" not in str(caught.value)


def test_a_custom_operator_library_that_does_not_load_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"library '/none\.so' does not load"):
        Session(diamond(), annotation_of(diamond()), custom_ops=("/none.so",))


def test_a_closed_session_says_so_and_closes_again(towers: Session) -> None:
    before = threading.active_count()
    towers.run(None, ZEROS)
    towers.close()
    towers.close()
    assert threading.active_count() <= before
    with pytest.raises(UsageError, match=r"^The session is closed; load the model again\.$"):
        towers.run(None, ZEROS)


def test_threads_end_with_the_session() -> None:
    before = threading.active_count()
    with Session(diamond(), annotation_of(diamond())) as session:
        session.run(None, feeds_for(diamond()))
    assert threading.active_count() == before


def test_a_session_that_nobody_holds_is_closed() -> None:
    before = threading.active_count()
    session = Session(diamond(), annotation_of(diamond()))
    session.run(None, feeds_for(diamond()))
    assert threading.active_count() > before
    del session
    gc.collect()
    assert threading.active_count() == before


def test_a_session_that_fails_to_open_closes_what_was_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[OrtSession] = []
    closed: list[OrtSession] = []
    real = OrtSession.__init__

    def refuse_the_third(self: OrtSession, *arguments: Any) -> None:
        if len(opened) == 2:
            raise OnnxschedError("no more memory")
        opened.append(self)
        real(self, *arguments)

    monkeypatch.setattr(OrtSession, "__init__", refuse_the_third)
    monkeypatch.setattr(OrtSession, "close", lambda self: closed.append(self))
    with pytest.raises(OnnxschedError, match="no more memory"):
        Session(diamond(), annotation_of(diamond(), (1, 2, 3, 4)))
    assert closed == opened[::-1]


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("failing", ["top", "left", "right", "y"])
def test_an_error_in_one_stream_ends_the_run_and_the_next_run_works(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model = diamond()
    feeds = feeds_for(model)
    real = OrtSession.run

    def run(self: OrtSession, given: Feeds, outputs: Sequence[str] | None = None) -> list[Any]:
        if failing in (outputs or ()):
            raise MemoryError(failing)
        return real(self, given, outputs)

    with Session(model, annotation_of(model, (1, 2, 3, 4))) as session:
        for _ in range(10):
            with monkeypatch.context() as patch:
                patch.setattr(OrtSession, "run", run)
                with pytest.raises(MemoryError, match=failing):
                    session.run(None, feeds)
            assert_same(session.run(None, feeds), reference(model, feeds))


@pytest.mark.timeout(60, method="thread")
def test_data_that_ort_refuses_ends_the_run_with_its_error() -> None:
    model = model_of(
        """(float[3] x, int64 index) => (float[3] y) {
            a = Relu(x)
            one = Gather(x, index)
            y = Add(a, one)
        }"""
    )
    with Session(model, annotation_of(model, (2, 3, 1))) as session:
        x = np.ones(3, np.float32)
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session(x, np.array(9))
        np.testing.assert_array_equal(session(x, np.array(1)), [2, 2, 2])


def test_a_split_may_have_as_many_pieces_as_ort_allows() -> None:
    names = [f"piece_{number}" for number in range(300)]
    model = models.model_of(
        f"""(float[600] x) => (float[600] y) {{
            {", ".join(names)} = Split<axis = 0>(x, sizes)
            y = Concat<axis = 0>({", ".join(reversed(names))})
        }}""",
        sizes=np.full(300, 2),
    )
    feeds = models.feeds_for(model)
    with Session(model, models.annotation_of(model)) as session:
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_operators_that_nobody_reads_may_be_alone_on_a_stream() -> None:
    model = model_of("(float[3] x) => (float[3] y) { unread = Neg(x)  y = Relu(x) }")
    feeds = feeds_for(model)
    with Session(model, annotation_of(model, (1, 2))) as session:
        assert_same(session.run(None, feeds), reference(model, feeds))


@pytest.mark.parametrize(
    ("shape", "expected"), [((4, 6), True), ((1, 6), False), ((3, 1), False), ((2, 1, 4, 6), True)]
)
def test_workspace_matters_to_products_of_matrices(shape: tuple[int, ...], expected: bool) -> None:
    model = models.model_of("(float[4,4] x) => (float[4,4] y) { y = MatMul(x, x) }")
    tensors = {"y": TensorType(onnx.TensorProto.FLOAT, shape)}
    assert multiplies_matrices(model, tensors) == expected
    assert multiplies_matrices(model, {}), "what is not known may matter"
    convolutional = models.fork_join()
    assert not multiplies_matrices(convolutional, models.tensor_types(convolutional))
