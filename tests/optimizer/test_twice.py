"""Operators are computed twice where copying takes longer, and never where that is unwanted."""

from __future__ import annotations

import json
import tempfile
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
from onnx import helper

import onnxsched
from onnxsched import exploration, proposals, scheduling, tuning
from onnxsched.annotate import annotation_for
from onnxsched.checking import run_plain
from onnxsched.contraction import contract_cost
from onnxsched.decision import Decision, decide
from onnxsched.inspection import inspect_model
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome
from onnxsched.profile import OperatorProfile, Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.transfers import Transfers
from onnxsched.proposals import Request
from onnxsched.racing import time_runs_us
from onnxsched.refinement import Refined
from onnxsched.rewriting import rewritten
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.schedule_file import placements_to_json
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.load import Session
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.fake_cuda import install
from support.graphs import linear
from support.models import CPU, feeds_for, model_of, reference, weight
from support.optimizing import as_it_is, assert_close, loaded, plain_outputs, saved

GROUPS = (Device("cpu", 0), Device("cpu", 1))
LONG = {"Conv", "FusedConv", "MatMul", "Gemm"}


def profiled(model: Model, *_: Any) -> Profile:
    """Convolutions and products take 1000 us, all else 10."""
    operators = {
        node.name: OperatorProfile((1000.0 if node.op_type in LONG else 10.0,))
        for node in model.proto.graph.node
    }
    return Profile(operators, dict.fromkeys(operators, "compute"), None, len(operators))


def slow_transfers(devices: Sequence[Device], *_: Any) -> Transfers:
    """16 KiB take 500 us."""
    return {pair: linear(0.0, 2.0**15 / 1000) for pair in permutations(devices, 2)}


def make_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few operators take long, and transfers; whichever is faster, copies are chosen."""

    def chosen(outcomes: Sequence[Outcome], *rest: Any) -> Decision:
        ranked = sorted(
            outcomes, key=lambda o: (not o.samples_us, not o.form[1].endswith("twice"))
        )
        return decide(ranked, *rest)

    monkeypatch.setattr(scheduling, "measure_profile", profiled)
    monkeypatch.setattr(scheduling, "measure_transfers", slow_transfers)
    monkeypatch.setattr(scheduling, "decide", chosen)
    monkeypatch.setattr(tuning, "_finalists", list)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    make_slow(monkeypatch)


def wide_result(branch_count: int = 2) -> onnx.ModelProto:
    """A cheap operator whose large result expensive branches read."""
    branches = range(branch_count)
    lines = [f"a{n} = MatMul(wide, w{n})  b{n} = ReduceMax(a{n})" for n in branches]
    return model_of(
        f"""(float[64,1] x, float[1,64] z) => (float[1,1] y) {{
            wide = Add(x, z)  {"  ".join(lines)}  y = Sum({", ".join(f"b{n}" for n in branches)})
        }}""",
        **{f"w{n}": weight(64, 64) + n for n in branches},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(wide_result(), tmp_path)


def optimized(source: Path, target: Path, **options: Any) -> onnxsched.OptimizeResult:
    defaults: dict[str, Any] = {"device": "cpu:0,cpu:1", "streams": 1, "cache_dir": None}
    return onnxsched.optimize(source, target, **defaults | options)


def check_written(path: Path, machine: Machine) -> None:
    """Check that a file's schedule is one of the file's operators."""
    model = as_it_is(onnx.load(path))
    index = {node.name: number for number, node in enumerate(model.proto.graph.node)}
    placements = read_annotation(model.proto).placements
    slots = tuple(Slot(index[name], placement) for name, placement in placements.items())
    check_schedule(graph_from_model(model), machine, Schedule(slots))


@pytest.mark.parametrize("policy", ["auto", "heft", "hios-lp"])
def test_a_cheap_operator_with_a_large_result_is_computed_on_both_devices(
    policy: str, slow: None, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    result = optimized(source, target, policy=policy)
    assert (result.rewrite, result.devices) == ("twice", GROUPS)
    assert policy in ("auto", result.policy)
    [entry] = [a for a in result.alternatives if a["rewrite"] == "twice"]
    others = [a["predicted_us"] for a in result.alternatives if a is not entry]
    assert entry["predicted_us"] == pytest.approx(1030.0, abs=5.0)
    assert entry["predicted_us"] < 0.8 * min(others)
    written = onnx.load(target)
    assert [node.op_type for node in written.graph.node].count("Add") == 2
    names = {node.name for node in written.graph.node}
    [copy] = [name for name in names if name.endswith("/copy")]
    placements = read_annotation(written).placements
    devices = {placements[copy].device, placements[copy.removesuffix("/copy")].device}
    assert devices == set(GROUPS)
    assert inspect_model(target).to_json()["rewrite"] == "twice"
    check_written(target, Machine(GROUPS, 1))
    with onnxsched.load(target) as session:
        for seed in range(3):
            feeds = feeds_for(wide_result(), seed)
            assert_close(session.run(None, feeds), plain_outputs(source, feeds))
    assert_close(plain_outputs(target, feeds), plain_outputs(source, feeds))
    again = optimized(target, tmp_path / "again.onnx", policy=policy)
    assert (again.rewrite, again.operator_count) == ("twice", result.operator_count)


def test_copies_are_tried_like_all_else_and_win_only_if_they_are_faster(
    slow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "decide", decide)
    source, target = saved(wide_result(4), tmp_path), tmp_path / "out.onnx"
    result = optimized(source, target, streams=2)
    assert "twice" in {a["rewrite"] for a in result.alternatives}
    assert all(a["tried_us"] for a in result.alternatives)
    fastest = min(result.alternatives, key=lambda a: a["measured_us"])
    assert (result.rewrite, result.policy) == (fastest["rewrite"], fastest["policy"])


def test_what_was_computed_twice_comes_from_the_cache_as_it_was(
    slow: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    options = {"cache_dir": tmp_path / "cache"}
    assert optimized(source, first, **options).rewrite == "twice"
    for what in ("measure_profile", "measure_transfers", "tune"):
        monkeypatch.delattr(scheduling, what)
    result = optimized(source, again, **options)
    assert (result.from_cache, result.rewrite) == (True, "twice")
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "options", [{"split": False}, {"variants": False}, {"device": "cpu", "streams": 2}], ids=str
)
def test_nothing_is_computed_twice_where_that_is_unwanted_or_no_use(
    options: dict[str, Any],
    slow: None,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(proposals, "recompute")
    result = optimized(source, tmp_path / "out.onnx", **options)
    assert {a["rewrite"] for a in result.alternatives} == {"none"}


def test_a_schedule_from_a_file_is_obeyed_without_copies(
    slow: None, source: Path, tmp_path: Path
) -> None:
    target, file = tmp_path / "out.onnx", tmp_path / "s.json"
    assert optimized(source, target, split=False, policy="heft").devices == GROUPS
    file.write_text(json.dumps(placements_to_json(inspect_model(target).annotation.placements)))
    result = optimized(source, target, schedule=file, streams=None)
    assert (result.policy, result.rewrite) == ("file", "none")
    assert {a["rewrite"] for a in result.alternatives} == {"none"}


def test_a_small_gain_is_not_tried(
    slow: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain = (1520.0 - 1030.0) / 1520.0
    for least_gain, expected in ((gain - 0.05, {"none", "twice"}), (gain + 0.05, {"none"})):
        monkeypatch.setattr(proposals, "_LEAST_GAIN", least_gain)
        result = optimized(source, tmp_path / "out.onnx")
        assert {a["rewrite"] for a in result.alternatives} == expected


@st.composite
def branching_models(draw: DrawFn) -> onnx.ModelProto:
    """Cheap operators with large results, which products read; some are outputs themselves."""
    lines, large = [], ["x"]
    for number in range(draw(st.integers(1, 3))):
        name = f"large{number}"
        op_type = draw(st.sampled_from(["Neg", "Relu", "Sigmoid"]))
        lines.append(f"{name} = {op_type}({draw(st.sampled_from(large))})")
        large.append(name)
    names = [f"product{number}" for number in range(draw(st.integers(2, 4)))]
    for name in names:
        lines.append(f"{name} = MatMul({draw(st.sampled_from(large[1:]))}, {name}w)")
    outputs = ["y", *draw(st.lists(st.sampled_from(large[1:]), max_size=2, unique=True))]
    return model_of(
        f"""(float[64,64] x) => ({", ".join(f"float[64,n] {name}" for name in outputs)}) {{
            {"  ".join(lines)}  y = Sum({", ".join(names)})
        }}""",
        **{f"{name}w": weight(64, 1) + number for number, name in enumerate(names)},
    )


@settings(deadline=None, max_examples=25)
@given(model=branching_models(), budget_s=st.sampled_from([0.0, 1.0]))
def test_outputs_stay_whatever_is_computed_twice(model: onnx.ModelProto, budget_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        make_slow(patch)
        source, target = saved(model, Path(folder)), Path(folder, "out.onnx")
        result = optimized(source, target, policy="heft", budget_s=budget_s)
        check_written(target, Machine(GROUPS, 1))
        is_copied = any(node.name.endswith("/copy") for node in inspect_model(target).nodes)
        assert is_copied == (result.rewrite == "twice")
        feeds = feeds_for(model)
        with onnxsched.load(target) as session:
            assert_close(session.run(None, feeds), plain_outputs(source, feeds))


NHWC = Variant("nhwc")


def renamed(model: Model, variant: Variant, *_: Any) -> Model:
    """What a GPU may make of a model: products under other names, an operator more before each."""
    proto, tensors = onnx.ModelProto(), dict(model.tensors)
    proto.CopyFrom(model.proto)
    del proto.graph.node[:]
    for number, node in enumerate(model.proto.graph.node):
        if node.op_type == "MatMul":
            copied = f"{node.input[0]}/{number}"
            tensors[copied] = tensors[node.input[0]]
            added = helper.make_node("Identity", [node.input[0]], [copied], f"Transpose_{number}")
            proto.graph.node.append(added)
            product = helper.make_node("MatMul", [copied, node.input[1]], node.output)
            product.name = f"{node.name}_token_{number}"
            proto.graph.node.append(product)
        else:
            proto.graph.node.append(node)
    return replace(model, proto=proto, tensors=tensors, variant=variant, is_lowered=True)


@pytest.fixture
def gpus(slow: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Device, ...]:
    """Two GPUs that are the CPU, where local search and calibration do nothing, despite noise."""
    install(monkeypatch)
    monkeypatch.setattr(
        exploration,
        "_calibrated",
        lambda subject, tried: contract_cost(subject.contraction, subject.cost),
    )
    monkeypatch.setattr(
        exploration,
        "refine",
        lambda graph, start, placements, measure, *_, **__: Refined(start, measure(start)),
    )
    monkeypatch.setattr(
        cuda, "time_launches_us", lambda _, launch, count: time_runs_us(launch, count)
    )
    monkeypatch.setattr(scheduling, "lowered_model", renamed)
    return (Device("cuda", 0), Device("cuda", 1))


@pytest.mark.parametrize("variant", [DEFAULT_VARIANT, NHWC], ids=str)
def test_copies_stay_where_they_belong_in_a_lowered_model(
    variant: Variant,
    gpus: tuple[Device, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "_raced", lambda model, *_: [(model, renamed(model, variant))])
    proto = wide_result()
    model = loaded(proto, tmp_path)
    machine = Machine(gpus, 1)
    decision, _ = scheduling.measured_decision(
        model,
        MeasurementCache(None, ""),
        run_plain(model, CPU, 0, ()),
        Request("auto", machine, 5.0, True, ()),
        None,
        lambda *_: None,
    )
    spread = [a for a in decision.alternatives if len(a["devices"]) > 1]
    twice = [a["predicted_us"] for a in spread if a["rewrite"] == "twice"]
    others = [a["predicted_us"] for a in spread if a["rewrite"] != "twice"]
    assert min(twice) < 0.8 * min(others)
    assert (decision.rewrite, decision.variant, decision.schedule.devices) == (
        "twice", variant, gpus,
    )  # fmt: skip
    portable = rewritten(model, decision.rewrite, decision.duplicates)
    check_schedule(graph_from_model(portable), machine, decision.schedule)
    lowered = renamed(portable, variant)
    annotation = annotation_for(portable, decision.schedule, decision.variant)
    with Session(portable.proto, annotation, lowered=lowered.source) as session:
        for seed in range(2):
            feeds = feeds_for(proto, seed)
            assert_close(session.run(None, feeds), reference(proto, feeds))
