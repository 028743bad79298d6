"""Which lanes may do without their sessions, what they write then, and which sessions end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched_runtime.device import Device
from onnxsched_runtime.executors import runner
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.lanes import Lane, lanes_of, marked_part, written_instead
from onnxsched_runtime.outliving import outliving, weights_to_place
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.views import is_view
from support import fake_cuda, models

GPU = Device("cuda")


def planned(
    model: onnx.ModelProto, streams: Iterable[int] = (0,)
) -> tuple[ModelSource, ExecutionPlan, list[Lane]]:
    annotation = models.annotation_of(model, tuple(streams), device=GPU)
    plan = plan_model(model, annotation.placements, annotation.host_reasons)
    source = ModelSource(model, annotation.tensors, is_lowered=True)
    lanes = [lane for p in plan.pieces if p.captured for lane in lanes_of(plan, p).lanes]
    return source, plan, lanes


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(models.MODELS)), streams=st.lists(st.integers(0, 2), min_size=1)
)
def test_all_that_an_outliving_lane_writes_has_a_place(name: str, streams: list[int]) -> None:
    source, plan, lanes = planned(models.MODELS[name](), streams)
    for lane in lanes:
        found = outliving(source, plan, lane)
        assert found.outputs[: len(lane.outputs)] == lane.outputs
        if not found.outlives:
            assert found == lane
            continue
        nodes = [source.nodes[n] for i in lane.segments for n in plan.segments[i].nodes]
        assert viewed(nodes).isdisjoint(found.outputs[len(lane.outputs) :])
        written = {t for node in nodes if not is_view(node) for t in node.output if t}
        instead = written_instead(source, plan, found)
        assert instead == written_instead(source, plan, lane)
        assert written == {*found.outputs} - viewed(nodes) | {*instead.values()}
        assert len(set(found.outputs)) == len(found.outputs)


def viewed(nodes: list[onnx.NodeProto]) -> set[str]:
    """The views that a lane writes."""
    return {node.output[0] for node in nodes if is_view(node)}


def test_a_product_needs_its_session() -> None:
    model = models.model_of(
        "(float[2,3] x) => (float[2,3] y) { a = Relu(x)\n b = MatMul(a, w)\n y = Add(b, a) }",
        w=models.weight(3, 3),
    )
    source, plan, (lane,) = planned(model)
    assert outliving(source, plan, lane) == lane


def sliced(starts: str) -> onnx.ModelProto:
    """A model that reads the start of a slice from a weight or from its caller."""
    return models.model_of(
        f"""(float[4] x, int64[1] given) => (float[2] y) {{
            a = Relu(x)
            b = Slice(a, {starts}, ends)
            y = Mul(b, scale)
        }}""",
        known=np.array([1]),
        ends=np.array([3]),
        scale=models.weight(2),
    )


@pytest.mark.parametrize(("starts", "outlives"), [("known", True), ("given", False)])
def test_what_the_host_is_told_must_be_known(starts: str, outlives: bool) -> None:
    model = sliced(starts)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("b", 1, [2]))
    source, plan, (lane,) = planned(model)
    assert outliving(source, plan, lane).outlives == outlives


def test_weights_that_kernels_read_flow_in() -> None:
    source, plan, (lane,) = planned(sliced("known"))
    lane = outliving(source, plan, lane)
    assert lane.outputs == ("y", "a", "b")
    weights = weights_to_place(source, plan, lane)
    assert weights == ("scale",)
    part = onnx.ModelProto.FromString(marked_part(source, plan, lane, weights).content)
    assert [value.name for value in part.graph.input] == ["x", "scale"]
    assert {weight.name for weight in part.graph.initializer} == {"known", "ends"}


def test_where_the_host_reads_a_weight_too_the_session_stays() -> None:
    model = models.model_of(
        """(int64[4] x) => (int64[2] y) {
            a = Slice(x, two, four)
            y = Add(a, two)
        }""",
        two=np.array([2]),
        four=np.array([4]),
    )
    source, plan, (lane,) = planned(model)
    assert outliving(source, plan, lane) == lane


def test_where_sessions_fuse_operators_they_stay() -> None:
    source, plan, lanes = planned(models.diamond(), (0, 1))
    assert all(outliving(source, plan, lane).outlives for lane in lanes)
    source, plan, (lane,) = planned(models.diamond())
    assert outliving(source, plan, lane).outlives
    assert outliving(replace(source, is_lowered=False), plan, lane) == lane


def test_marks_keep_sessions_from_fusing_operators() -> None:
    source, plan, lanes = planned(models.diamond(), (0, 0, 1, 0))
    found = [outliving(replace(source, is_lowered=False), plan, lane) for lane in lanes]
    assert (
        [lane.outlives for lane in found] == [bool(lane.marks) for lane in lanes] == [True, False]
    )


@pytest.mark.parametrize("domain", ["", "com.microsoft", "elsewhere"])
def test_operators_of_unknown_domains_need_their_sessions(domain: str) -> None:
    model = models.chain()
    model.graph.node[1].domain = domain
    source, plan, (lane,) = planned(model)
    assert outliving(source, plan, lane).outlives == (domain != "elsewhere")


@pytest.mark.parametrize(
    ("weight", "outlives"),
    [
        (models.weight(1, 3), True),
        (models.weight(0, 3), False),
        (np.zeros((1, 3), "bfloat16"), False),
    ],
)
def test_weights_need_addresses_to_be_read_by_them(weight: models.Array, outlives: bool) -> None:
    kind = "float" if weight.dtype == np.float32 else "bfloat16"
    rows = 2 + len(weight)
    source, plan, (lane,) = planned(
        models.model_of(
            f"""({kind}[2,3] x) => ({kind}[{rows},3] y) {{
                a = Relu(x)
                y = Concat<axis = 0>(a, some)
            }}""",
            some=weight,
        )
    )
    assert outliving(source, plan, lane).outlives == outlives


def test_a_session_stays_where_a_tensor_has_no_fixed_size() -> None:
    source, plan, (lane,) = planned(models.chain())
    left = {name: kind for name, kind in source.tensors.items() if name != "a"}
    assert outliving(replace(source, tensors=left), plan, lane) == lane


@pytest.mark.parametrize(
    ("step", "count", "outlives"),
    [
        ("Relu({0})", 11, True),
        ("Relu({0})", 12, False),
        ("Add({0}, {1})", 12, True),
        ("Add({0}, {1})", 13, False),
    ],
)
def test_a_session_stays_where_its_end_costs_more_memory(
    step: str, count: int, outlives: bool
) -> None:
    """A chain in one segment needs few of its tensors at a time, and has a place for each."""
    steps = (step.format(f"t{n}", f"t{max(n - 1, 0)}") for n in range(count))
    chain = "\n".join(f"t{n} = {step}" for n, step in enumerate(steps, 1))
    big = "float[256,1024]"
    source, plan, (lane,) = planned(
        models.model_of(f"({big} t0) => ({big} t{count}) {{ {chain} }}")
    )
    assert len(lane.segments) == 1
    assert outliving(source, plan, lane).outlives == outlives


def test_one_segment_that_costs_more_is_enough_for_a_session_to_stay() -> None:
    chain = "\n".join(f"t{n + 1} = Relu(t{n})" for n in range(13))
    model = models.model_of(
        f"""(float[256,1024] t0) => (float[256,1024] y) {{
            {chain}
            side = Neg(t13)
            y = Add(side, t13)
        }}"""
    )
    source, plan, (lane, _) = planned(model, (*[0] * 13, 1, 0))
    assert len(lane.segments) == 2
    assert outliving(source, plan, lane) == lane


@pytest.mark.parametrize(("needs", "left"), [(False, 0), (True, 2)])
def test_a_session_ends_where_its_capture_needs_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, needs: bool, left: int
) -> None:
    fake_cuda.install(monkeypatch)
    opened: list[OrtSession] = []
    places: list[tuple[int, int]] = []
    close = OrtSession.close

    def closed(session: OrtSession) -> None:
        opened[:] = [other for other in opened if other is not session]
        close(session)

    def reaches_only(chain: object, known: Iterable[tuple[int, int]]) -> bool:
        places.extend(known)
        return not needs

    make = vars(runner)["OrtSession"]

    def made(*arguments: Any) -> OrtSession:
        assert needs or not opened, "one after another"
        opened.append(make(*arguments))
        return opened[-1]

    monkeypatch.setattr(runner, "OrtSession", made)
    monkeypatch.setattr(OrtSession, "close", closed)
    monkeypatch.setattr(fake_cuda.FakeChain, "reaches_only", reaches_only)
    source, plan, _ = planned(models.diamond(), (0, 1))
    with StreamExecutor(source, plan) as executor:
        assert len(opened) == left
        buffers = executor._runner.buffers
        assert {"top", "left", "right"} <= buffers.keys()
        assert {(b.pointer, b.kind.nbytes) for b in buffers.values()} <= {*places}
    assert not opened
