"""The CUDA executor's decisions, on fakes: what is captured, copied, run on the host, refused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from onnxsched_runtime import cuda
from onnxsched_runtime.arena import plan_arena
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError, UsageError
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.executors.segments import SegmentRunner
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.load import Session
from onnxsched_runtime.plan import Piece
from onnxsched_runtime.session import OrtSession
from support import fake_cuda, models

GPU = Device("cuda")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[fake_cuda.FakeGraph]:
    return fake_cuda.install(monkeypatch)


@contextmanager
def opened(model: onnx.ModelProto, capture: Capture = "whole") -> Iterator[Session]:
    with Session(model, models.annotation_of(model, device=GPU), capture=capture) as session:
        yield session


def executor_of(session: Session) -> StreamExecutor:
    assert isinstance(session.executor, StreamExecutor)
    return session.executor


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("capture", ["whole", "ort", "none"])
def test_every_model_computes_what_plain_ort_does_however_it_is_captured(
    graphs: type[fake_cuda.FakeGraph], name: str, capture: Capture
) -> None:
    model = models.MODELS[name]()
    with opened(model, capture) as session:
        assert (session.capture, session.refusal) == (capture, None)
        for seed in range(4):
            feeds = models.feeds_for(model, seed)
            models.assert_same(session.run(None, feeds), models.reference(model, feeds))


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("capture", ["whole", "none"])
def test_every_model_computes_the_same_on_several_devices(
    graphs: type[fake_cuda.FakeGraph], name: str, capture: Capture
) -> None:
    model = models.MODELS[name]()
    annotation = models.annotation_of(model, (0, 1), device=GPU, device_count=3)
    with Session(model, annotation, capture=capture) as session:
        assert (session.capture, session.refusal) == (capture, None)
        for seed in range(3):
            feeds = models.feeds_for(model, seed)
            models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_a_model_without_host_operators_is_one_launch(
    graphs: type[fake_cuda.FakeGraph],
) -> None:
    model = models.fork_join()
    with opened(model) as session:
        executor = executor_of(session)
        assert (executor.is_one_piece, executor.graph_count) == (True, 1)
        session.run(None, models.feeds_for(model))
        assert graphs.launches == 1


def test_one_graph_is_there_however_it_is_run(graphs: type[fake_cuda.FakeGraph]) -> None:
    model = models.fork_join()
    feeds = models.feeds_for(model)
    with opened(model) as session:
        executor = executor_of(session)
        assert graphs.open_count == 1
        first = session.run(None, feeds)
        assert graphs.open_count == 1, "the one with copies is made instead"
        for name, array in feeds.items():
            executor._runner.buffers[name].fill(array, executor.main_stream)
        executor.launch()
        assert (executor.graph_count, graphs.open_count) == (1, 2)
        models.assert_same(session.run(None, feeds), first)
        assert graphs.open_count == 2
    assert graphs.open_count == 0


def test_the_order_of_outputs_makes_no_new_graph_and_only_a_few_are_kept(
    graphs: type[fake_cuda.FakeGraph],
) -> None:
    model = models.model_of(
        """(float[6] x) => (float[6] a, float[6] b, float[6] c) {
            a = Relu(x)
            b = Neg(x)
            c = Abs(x)
        }"""
    )
    names = ("a", "b", "c")
    feeds = models.feeds_for(model)
    expected = dict(zip(names, models.reference(model, feeds), strict=True))
    with opened(model) as session:
        for wanted in permutations(names):
            models.assert_same(session.run(wanted, feeds), [expected[name] for name in wanted])
        assert graphs.open_count == 1
        models.assert_same(session.run(["b", "b"], feeds), [expected["b"]] * 2)
        for _ in range(2):
            for count in (1, 2):
                for wanted in combinations(names, count):
                    found = session.run(wanted, feeds)
                    models.assert_same(found, [expected[name] for name in wanted])
        assert graphs.open_count == 4
    assert graphs.open_count == 0


@pytest.mark.parametrize("capture", ["whole", "ort", "none"])
def test_weights_are_not_kept_on_the_host(
    graphs: type[fake_cuda.FakeGraph], capture: Capture
) -> None:
    model = models.fork_join()
    with opened(model, capture) as session:
        assert not executor_of(session)._runner._source.model.graph.initializer
        feeds = models.feeds_for(model)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_a_session_that_nobody_holds_gives_its_graphs_back(
    graphs: type[fake_cuda.FakeGraph],
) -> None:
    model = models.fork_join()
    session = Session(model, models.annotation_of(model, device=GPU))
    session.run(None, models.feeds_for(model))
    assert graphs.open_count == 1
    del session
    gc.collect()
    assert graphs.open_count == 0


def test_an_input_that_nobody_reads_may_be_an_output(graphs: type[fake_cuda.FakeGraph]) -> None:
    model = models.model_of("(float[6] x, float[3] z) => (float[3] z, float[6] y) { y = Relu(x) }")
    feeds = models.feeds_for(model)
    with opened(model) as session:
        for seed in range(2):
            feeds = models.feeds_for(model, seed)
            first, second = session.run(["z", "y"], feeds)
            models.assert_same([first, second], [feeds["z"], np.maximum(feeds["x"], 0)])
            assert first is not feeds["z"]


def test_host_operators_run_between_graphs(graphs: type[fake_cuda.FakeGraph]) -> None:
    model = models.branch()
    with opened(model) as session:
        captured = [piece.captured for piece in session.plan.pieces]
        assert False in captured
        assert not executor_of(session).is_one_piece
        assert executor_of(session).graph_count == sum(captured)
        session.run(None, models.feeds_for(model))
        assert graphs.launches == sum(captured)


@pytest.mark.parametrize(("refusals", "expected"), [(0, "whole"), (1, "ort")])
def test_a_refused_capture_falls_back_and_says_why(
    graphs: type[fake_cuda.FakeGraph], refusals: int, expected: str
) -> None:
    graphs.refusals = refusals
    model = models.diamond()
    feeds = models.feeds_for(model)
    with opened(model) as session:
        assert session.capture == expected
        assert (session.refusal is None) == (refusals == 0)
        assert session.refusal is None or "whole: The capture was refused" in session.refusal
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_where_nothing_works_the_last_error_is_raised(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, piece: object) -> None:
        raise OnnxschedError("ONNX Runtime failed: planted.")

    for runner in (LaneRunner, SegmentRunner):
        monkeypatch.setattr(runner, "prepare", fail)
    with pytest.raises(OnnxschedError, match="planted"), opened(models.diamond()):
        pass


@pytest.mark.parametrize("name", ["diamond", "two_towers", "branch", "data_dependent", "split"])
def test_tensors_in_give_tensors_out(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import torch

    fake_cuda.take_tensors_for_gpus(monkeypatch)
    model = models.MODELS[name]()
    with opened(model) as session:
        kept = []
        for seed in range(3):
            feeds = models.feeds_for(model, seed)
            tensors = {n: torch.from_numpy(np.array(array)) for n, array in feeds.items()}
            kept.append((feeds, session.run(None, tensors)))
        for feeds, results in kept:
            assert all(isinstance(result, torch.Tensor) for result in results)
            models.assert_same([r.numpy() for r in results], models.reference(model, feeds))


def test_outputs_are_ready_on_the_current_stream_of_the_device_that_they_are_on(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    said: list[tuple[str, Device | None]] = []

    def noted(word: str) -> Callable[[Any, Device], None]:
        return lambda self, device: said.append((word, device))

    def made(self: fake_cuda.FakeBuffer) -> Any:
        said.append(("made", None))
        return torch.empty(self.kind.shape or ())

    monkeypatch.setattr(fake_cuda.FakeStream, "wait_for_caller", noted("wait"))
    monkeypatch.setattr(fake_cuda.FakeStream, "release_to_caller", noted("release"))
    monkeypatch.setattr(fake_cuda.FakeBuffer, "new_tensor", made)
    model = models.two_towers()
    annotation = models.annotation_of(model, device=GPU, device_count=2)
    feeds = models.feeds_for(model)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    with Session(model, annotation) as session:
        executor = executor_of(session)
        names = [value.name for value in model.graph.output]
        homes = {session.plan.device_of[name] for name in names}
        assert homes - {executor.main_stream.device}, "one is on another GPU"
        results = executor.run_on_device(tensors, names)
    models.assert_same([r.numpy() for r in results], models.reference(model, feeds))
    words = [word for word, _ in said]
    assert words == sorted(words, key=["made", "wait", "release"].index)
    for word in ("wait", "release"):
        found = [device for said_word, device in said if said_word == word]
        assert len(found) == len(set(found))
        assert set(found) == {*homes, executor.main_stream.device}


class OrderedStream(fake_cuda.FakeStream):
    """Knows what is done before what it runs next: by itself, and by what it waited for."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.done: frozenset[str] = frozenset()

    def record(self) -> OrderedStream:
        return copy(self)

    def wait(self, event: fake_cuda.FakeStream) -> None:
        assert isinstance(event, OrderedStream)
        super().wait(event)
        self.done |= event.done


@pytest.mark.parametrize("capture", ["whole", "none"])
@pytest.mark.parametrize("name", ["branch", "data_dependent"])
def test_inputs_are_filled_once_the_run_before_has_ended_on_its_stream(
    graphs: type[fake_cuda.FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capture: Capture,
) -> None:
    import torch

    real = fake_cuda.FakeBuffer.fill_from_tensor
    found: list[frozenset[str]] = []

    def fill(self: fake_cuda.FakeBuffer, tensor: Any, stream: Any) -> None:
        found.append(stream.done)
        real(self, tensor, stream)

    monkeypatch.setattr(cuda, "Stream", OrderedStream)
    monkeypatch.setattr(fake_cuda.FakeBuffer, "fill_from_tensor", fill)
    fake_cuda.take_tensors_for_gpus(monkeypatch)
    model = models.MODELS[name]()
    feeds = {n: torch.from_numpy(np.array(a)) for n, a in models.feeds_for(model).items()}
    annotation = models.annotation_of(model, device=GPU, device_count=2)
    with Session(model, annotation, capture=capture) as session:
        executor = executor_of(session)
        end = executor._runner.streams[session.plan.pieces[-1].main]
        assert isinstance(end, OrderedStream)
        assert end is not executor.main_stream
        for run in ("first", "second"):
            found.clear()
            session.run(None, feeds)
            end.done |= {run}
    assert found
    assert all("first" in done for done in found)


class BusyStream(fake_cuda.FakeStream):
    """Is busy with what was issued until somebody waits for it."""

    opened: ClassVar[list[BusyStream]] = []

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.is_busy = False
        self.opened.append(self)

    def synchronize(self) -> None:
        self.is_busy = False


@pytest.mark.parametrize("name", ["branch", "loop", "sequence", "data_dependent"])
def test_a_piece_begins_once_other_streams_have_done_what_was_before(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    launch, copied = fake_cuda.FakeGraph.launch, fake_cuda.FakeBuffer._copy
    run = OrtSession.run
    hosted: list[OrtSession] = []

    def busy() -> list[BusyStream]:
        return [stream for stream in BusyStream.opened if stream.is_busy]

    def copy_on(
        self: fake_cuda.FakeBuffer, target: int, source: int, stream: Any, *part: int
    ) -> None:
        copied(self, target, source, stream, *part)
        stream.is_busy = True

    def launch_on(self: fake_cuda.FakeGraph, stream: Any) -> None:
        assert {*busy()} <= {stream}
        launch(self, stream)
        stream.is_busy = True

    def run_on_host(self: OrtSession, *arguments: Any) -> list[Any]:
        assert busy() == []
        hosted.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(BusyStream, "opened", [])
    monkeypatch.setattr(cuda, "Stream", BusyStream)
    model = models.MODELS[name]()
    feeds = models.feeds_for(model)
    with Session(model, models.annotation_of(model, device=GPU, device_count=2)) as session:
        monkeypatch.setattr(fake_cuda.FakeBuffer, "_copy", copy_on)
        monkeypatch.setattr(fake_cuda.FakeGraph, "launch", launch_on)
        monkeypatch.setattr(OrtSession, "run", run_on_host)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))
        assert busy() == []
    assert hosted
    assert len(BusyStream.opened) > 1


def test_large_tensors_are_copied_in_parts_but_for_arrays_in_another_order(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.fork_join()
    image = models.feeds_for(model)["x"]
    image.flags.writeable = False
    copied = fake_cuda.FakeBuffer._copy
    parts: dict[int, list[tuple[int, int | None]]] = {}

    def copy_part(
        self: fake_cuda.FakeBuffer, target: int, source: int, stream: Any,
        start: int = 0, end: int | None = None,
    ) -> None:  # fmt: skip
        parts.setdefault(self.kind.nbytes, []).append((start, end))
        copied(self, target, source, stream, start, end)

    with opened(model) as session:
        monkeypatch.setattr(fake_cuda.FakeBuffer, "_copy", copy_part)
        models.assert_same(session.run(None, {"x": image}), models.reference(model, {"x": image}))
        assert parts == {
            n: [(start, min(start + 28, n)) for start in range(0, n, 28)] for n in (432, 1152)
        }
        executor = executor_of(session)
        buffer = executor._runner.buffers["x"]
        for array in (image[..., ::-1], np.asfortranarray(image)):
            parts.clear()
            buffer.fill(array, executor.main_stream)
            np.testing.assert_array_equal(buffer.fetched(executor.main_stream)(), array)
            assert parts[432][0] == (0, None)


def test_a_tensor_that_does_not_fit_is_named(graphs: type[fake_cuda.FakeGraph]) -> None:
    import torch

    with opened(models.diamond()) as session:
        executor = executor_of(session)
        with pytest.raises(UsageError, match=r"Input 'x' takes shape \[2, 3\], got \[3, 2\]"):
            executor.run_on_device({"x": torch.zeros(3, 2)}, ["y"])
        with pytest.raises(UsageError, match=r"takes torch\.float32, got torch\.float64"):
            executor.run_on_device({"x": torch.zeros(2, 3, dtype=torch.float64)}, ["y"])


def test_closing_closes_every_stream(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[fake_cuda.FakeStream] = []

    class Counted(fake_cuda.FakeStream):
        def __init__(self, device: Device) -> None:
            super().__init__(device)
            created.append(self)

    monkeypatch.setattr(cuda, "Stream", Counted)
    with opened(models.fork_join()):
        assert created
        assert all(stream.is_open for stream in created)
    assert not any(stream.is_open for stream in created)


@pytest.mark.parametrize("capture", ["whole", "none"])
def test_a_graph_needs_one_stream_and_launching_one_for_each_placement(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch, capture: Capture
) -> None:
    created: list[Device] = []

    class Counted(fake_cuda.FakeStream):
        def __init__(self, device: Device) -> None:
            super().__init__(device)
            created.append(device)

    monkeypatch.setattr(cuda, "Stream", Counted)
    model = models.fork_join()
    with opened(model, capture) as session:
        placements = {segment.placement for segment in session.plan.segments}
        assert len(session.plan.segments) > len(placements) > 1
        assert len(created) == (1 if capture == "whole" else len(placements))


def test_every_refusal_keeps_its_reason(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs.refusals = 1
    prepare = SegmentRunner.prepare
    calls: list[int] = []

    def fail_first(self: SegmentRunner, piece: Piece) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OnnxschedError("ONNX Runtime failed: planted.")
        prepare(self, piece)

    monkeypatch.setattr(SegmentRunner, "prepare", fail_first)
    with opened(models.diamond()) as session:
        assert session.capture == "none"
        assert session.refusal is not None
        assert "whole: The capture was refused" in session.refusal
        assert "ort: ONNX Runtime failed" in session.refusal


def test_a_model_that_stays_on_the_host_claims_no_capture(
    graphs: type[fake_cuda.FakeGraph],
) -> None:
    model = models.chain()
    annotation = models.annotation_of(model, device=GPU)
    reasons = dict.fromkeys(annotation.placements, "planted")
    with Session(model, replace(annotation, host_reasons=reasons)) as session:
        assert session.capture == "none"
        assert executor_of(session).graph_count == 0


def test_a_piece_after_the_host_is_warmed_up_on_zeros(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxsched_runtime.executors.runner.plan_arena", plan_arena)
    model = models.model_of(
        """(float[4] x) => (float[4,2] y) {
            a = Exp(x)
            b = Sub(a, a)
            index = Cast<to = 7>(b)
            y = Gather(table, index)
        }""",
        table=models.weight(3, 2),
    )
    annotation = models.annotation_of(model, device=GPU)
    annotation = replace(annotation, host_reasons={model.graph.node[2].name: "planted"})
    with Session(model, annotation, capture="none") as session:
        buffers = executor_of(session)._runner.buffers
        assert buffers["index"].pointer == buffers["a"].pointer, "else it proves nothing"
        assert session.refusal is None
        feeds = models.feeds_for(model)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_graphs_that_take_turns_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.streams, "Stream", fake_cuda.FakeStream)
    first, other = Device("cuda", 0), Device("cuda", 1)
    with cuda.graph_stream(first) as a, cuda.graph_stream(first) as b:
        assert a is not b
    with cuda.one_graph_stream():
        with cuda.graph_stream(first) as outer:
            pass
        with cuda.one_graph_stream(), cuda.graph_stream(first) as inner:
            assert inner is outer
        with cuda.graph_stream(first) as a, cuda.graph_stream(first) as b:
            assert a is outer
            assert a is b
        with cuda.graph_stream(other) as c, cuda.graph_stream(first) as d:
            assert c is not a
            assert d is a
        shared: Any = a
        assert shared.is_open
    assert not shared.is_open
    with cuda.graph_stream(first) as e:
        assert e is not a


def test_a_weight_that_two_streams_read_is_there_once(
    graphs: type[fake_cuda.FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[int] = []
    upload = fake_cuda.FakeMemory.upload

    def counted(memory: fake_cuda.FakeMemory, array: np.ndarray, offset_nbytes: int) -> None:
        uploads.append(array.nbytes)
        upload(memory, array, offset_nbytes)

    monkeypatch.setattr(fake_cuda.FakeMemory, "upload", counted)
    model = models.model_of(
        """(int64[4] x) => (float[4,64] y) {
            rows = Gather(table, x)
            hidden = Tanh(rows)
            y = Gemm<transB = 1>(hidden, table)
        }""",
        table=models.weight(64, 16),
    )
    with Session(model, models.annotation_of(model, (1, 2, 2), device=GPU)) as session:
        assert session.refusal is None
        assert uploads == [64 * 16 * 4]
        feeds = models.feeds_for(model)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))
