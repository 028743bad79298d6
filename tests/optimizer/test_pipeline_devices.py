"""Models over several devices: groups of threads in the place of GPUs."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxsched
from onnxsched import pipeline, regions, scheduling
from onnxsched.annotate import annotation_for
from onnxsched.checking import PlainRuns, run_plain
from onnxsched.comparison import Tolerances
from onnxsched.decision import Decision, decide
from onnxsched.environment import device_name
from onnxsched.inspection import inspect_model
from onnxsched.loading import Model, graph_from_model, load_model
from onnxsched.machine import Machine
from onnxsched.outcomes import Outcome
from onnxsched.policies import SPREADING
from onnxsched.profile import OperatorProfile, Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.measure import measure_profile
from onnxsched.profiling.transfers import Transfers
from onnxsched.proposals import Request
from onnxsched.racing import time_runs_us
from onnxsched.rewriting import Rewrites
from onnxsched.running import run_files
from onnxsched.schedule import check_schedule
from onnxsched.schedule_file import placements_to_json
from onnxsched.tuning import tune
from onnxsched.verify import verify
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError, OnnxschedError, UsageError
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import node_reads
from sample_models import build
from support.fake_cuda import install
from support.graphs import linear
from support.models import CPU, MODELS, feeds_for, model_of, random_models, reference, weight
from support.optimizing import assert_close, contents, loaded, plain_outputs, saved

GROUPS = (Device("cpu", 0), Device("cpu", 1))


def optimized(source: Path, target: Path, **options: Any) -> onnxsched.OptimizeResult:
    """What `optimize` returns over two groups of threads, where nothing is kept."""
    defaults: dict[str, Any] = {"device": "cpu:0,cpu:1", "streams": 2, "cache_dir": None}
    return onnxsched.optimize(source, target, **defaults | options)


def free_transfers(devices: Sequence[Device], *_: Any) -> Transfers:
    """Links so fast that even the smallest operators are spread."""
    return {pair: linear(0.0, 2.0**40) for pair in permutations(devices, 2)}


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transfers be free, and whichever is faster, what uses both devices be chosen."""

    def chosen(outcomes: Sequence[Outcome], *rest: Any) -> Decision:
        ranked = sorted(
            outcomes, key=lambda o: (not o.samples_us, len(o.candidate.schedule.devices) < 2)
        )
        return decide(ranked, *rest)

    monkeypatch.setattr(scheduling, "measure_transfers", free_transfers)
    monkeypatch.setattr(scheduling, "decide", chosen)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return saved(build("tiny"), tmp_path, "tiny.onnx")


def assert_runs_like(target: Path, source: Path, model: onnx.ModelProto) -> None:
    with onnxsched.load(target) as session:
        for seed in range(3):
            feeds = feeds_for(model, seed)
            assert_close(session.run(None, feeds), plain_outputs(source, feeds))


@pytest.mark.parametrize("policy", ["auto", "hios-lp"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_keeps_its_outputs(
    name: str, policy: str, spread: None, tmp_path: Path
) -> None:
    model = MODELS[name]()
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    result = optimized(source, target, policy=policy)
    assert set(result.devices) <= set(GROUPS)
    assert_runs_like(target, source, model)


@pytest.mark.parametrize("policy", SPREADING)
def test_a_policy_uses_both_devices_and_all_commands_know_them(
    policy: str, spread: None, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    result = optimized(tiny, target, policy=policy, streams=1)  # so that a device must help
    assert (result.policy, result.devices) == (policy, GROUPS)
    assert result.sequential_us is not None
    assert json.loads(json.dumps(result.to_json()))["devices"] == ["cpu:0", "cpu:1"]
    annotation = read_annotation(onnx.load(target))
    assert annotation.devices == GROUPS
    assert annotation.details["device_names"] == {str(d): device_name(d) for d in GROUPS}
    found = inspect_model(target)
    assert {node.placement.device for node in found.nodes} == set(GROUPS)
    assert found.plan.copies
    assert_runs_like(target, tiny, build("tiny"))
    assert all(d.is_within for d in verify(target, tiny, tolerances=Tolerances(1e-4)))
    assert run_files(target, {}, None).keys() == {"logits"}
    timed = onnxsched.bench(target, warmup_ms=0, duration_s=0, iterations=20)
    assert timed.to_json()["devices"] == ["cpu:0", "cpu:1"]
    assert [arm.name for arm in timed.arms] == ["ort", "sequential", "schedule"]


def test_what_uses_one_device_stays_on_the_first_and_takes_part(
    tiny: Path, tmp_path: Path
) -> None:
    result = optimized(tiny, tmp_path / "out.onnx", policy="nimble")
    assert (result.policy, result.devices) == ("nimble", GROUPS[:1])
    found = optimized(tiny, tmp_path / "out.onnx")
    measured = {a["policy"]: a["devices"] for a in found.alternatives if a["measured_us"]}
    assert measured["sequential"] == ["cpu:0"]
    assert found.measured_us <= (found.sequential_us or 0.0)


def test_more_are_tried_while_the_budget_lasts(tiny: Path, tmp_path: Path) -> None:
    plenty = optimized(tiny, tmp_path / "out.onnx")
    assert all(a["tried_us"] for a in plenty.alternatives)
    none = optimized(tiny, tmp_path / "out.onnx", budget_s=0.0)
    assert not any(a["tried_us"] for a in none.alternatives)
    assert sum(a["measured_us"] is not None for a in none.alternatives) == 3


def test_a_decision_is_kept_for_these_devices(
    spread: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache_dir": tmp_path / "cache"}
    first = optimized(tiny, tmp_path / "first.onnx", **options)
    assert not optimized(tiny, tmp_path / "one.onnx", device="cpu", **options).from_cache
    for what in ("measure_profile", "measure_transfers", "tune"):
        monkeypatch.delattr(scheduling, what)
    again = optimized(tiny, tmp_path / "again.onnx", **options)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()


def limited(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(
        pipeline,
        "machine_of",
        lambda devices, count: Machine(devices, count, dict.fromkeys(devices, nbytes)),
    )


@pytest.mark.parametrize(
    "body",
    ["a = MatMul(x, v)  y = MatMul(a, w)", "a = MatMul(x, v)  b = MatMul(x, w)  y = Add(a, b)"],
)
@pytest.mark.parametrize("policy", ["auto", "heft", "nimble"])
def test_a_model_too_large_for_one_device_is_spread_even_inside_a_chain(
    policy: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(
        f"(float[1,64] x) => (float[1,64] y) {{ {body} }}", v=weight(64, 64), w=weight(64, 64)
    )
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    limited(monkeypatch, 64 * 64 * 4 + 4096)
    if policy == "nimble":  # which does not know how to
        with pytest.raises(DeviceError, match="of policy nimble fits"):
            optimized(source, target, policy=policy)
        return
    result = optimized(source, target, policy=policy)
    assert (result.devices, result.sequential_us) == (GROUPS, None)
    assert {tuple(a["devices"]) for a in result.alternatives} == {("cpu:0", "cpu:1")}
    assert_runs_like(target, source, model)


def test_what_one_device_cannot_hold_is_not_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither plain ONNX Runtime, which the CPU takes over, nor variants in one stream."""
    asked: list[Device] = []

    def noted(model: Model, device: Device, *rest: Any) -> PlainRuns:
        asked.append(device)
        return run_plain(model, device, *rest)

    body = "a = MatMul(x, v)  y = MatMul(a, w)"
    weights = {"v": weight(64, 64), "w": weight(64, 64)}
    source = saved(
        model_of(f"(float[1,64] x) => (float[1,64] y) {{ {body} }}", **weights), tmp_path
    )
    devices = ("cpu:1,cpu:0", (GROUPS[1], GROUPS[0]))
    monkeypatch.setattr(pipeline, "run_plain", noted)
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: Rewrites(merged=("merge",)))
    monkeypatch.setattr(pipeline, "machine_of", lambda *_: Machine(devices[1], 1))
    optimized(source, tmp_path / "out.onnx", device=devices[0])
    monkeypatch.delattr(scheduling, "race_variants")
    limited(monkeypatch, 64 * 64 * 4 + 4096)
    optimized(source, tmp_path / "out.onnx", device=devices[0])
    assert asked == [GROUPS[1], GROUPS[0]]


def test_a_model_too_large_for_all_devices_is_refused_in_a_sentence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 1000)
    with pytest.raises(DeviceError, match=r"auto fits .* cpu:0 with 1000 bytes, cpu:1") as caught:
        optimized(tiny, tmp_path / "out.onnx")
    assert caught.value.exit_code == 4
    assert contents(tmp_path).keys() == {"tiny.onnx"}


def test_ctrl_c_and_the_budget_are_told_to_tuning(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Machine] = []

    def noted(subjects: Any, machine: Machine, **options: Any) -> Any:
        asked.append(machine)
        return tune(subjects, machine, **options)

    monkeypatch.setattr(scheduling, "tune", noted)
    optimized(tiny, tmp_path / "out.onnx", budget_s=0.0, streams=3)
    assert asked == [Machine(GROUPS, 3)]


def test_a_schedule_is_moved_to_other_devices_or_refused(
    spread: None, tiny: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.onnx"
    optimized(tiny, target, policy="hios-lp", streams=1)
    feeds = feeds_for(build("tiny"))
    expected = plain_outputs(tiny, feeds)
    for device_map in (
        {"cpu:0": "cpu:1", "cpu:1": "cpu:0"},
        {"cpu:1": "cpu:5"},
        {"cpu:1": "cpu:0"},
    ):
        with onnxsched.load(target, device_map=device_map) as session:
            assert_close(session.run(None, feeds), expected)
    with pytest.raises(DeviceError) as caught:
        onnxsched.load(target, device_map={"cpu:0": "cuda:98", "cpu:1": "cuda:99"})
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("Device cuda:98 is not available: this machine has ")


def random_schedule(path: Path, seed: int) -> dict[str, Any]:
    """Any order that the operators of an annotated file allow, on any of four streams."""
    rng = random.Random(seed)
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    entries = []
    while nodes:
        waiting = {tensor for node in nodes.values() for tensor in node.output}
        ready = [name for name, node in nodes.items() if waiting.isdisjoint(node_reads(node))]
        name = rng.choice(ready)
        del nodes[name]
        device, stream = rng.randrange(2), rng.randrange(2)
        entries.append({"name": name, "device": f"cpu:{device}", "stream": stream})
    return {"schema_version": 1, "operators": entries}


def placed(path: Path) -> list[tuple[str, str, int]]:
    """Names, devices and streams that an annotated file carries, in launch order."""
    placements = read_annotation(onnx.load(path)).placements
    return [(name, str(place.device), place.stream) for name, place in placements.items()]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_any_schedule_from_a_file_is_obeyed_and_keeps_the_outputs(
    name: str, seed: int, tmp_path: Path
) -> None:
    model = MODELS[name]() if name in MODELS else build("tiny")
    source, target, file = saved(model, tmp_path), tmp_path / "out.onnx", tmp_path / "s.json"
    optimized(source, target, policy="sequential", device="cpu")
    content = random_schedule(target, seed)
    file.write_text(json.dumps(content))
    result = optimized(source, target, schedule=file, streams=None)
    entries = [(e["name"], e["device"], e["stream"]) for e in content["operators"]]
    assert (result.policy, placed(target)) == ("file", entries)
    assert {a["policy"] for a in result.alternatives} == {"sequential", "file"}
    assert_runs_like(target, source, model)


@settings(deadline=None, max_examples=15)
@given(model=random_models(), seed=st.integers(0, 1000))
def test_random_models_keep_their_outputs_too(model: onnx.ModelProto, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target, file = (Path(folder, name) for name in ("in.onnx", "out.onnx", "s.json"))
        saved(model, Path(folder))
        optimized(source, target, policy="sequential", device="cpu")
        file.write_text(json.dumps(random_schedule(target, seed)))
        optimized(source, target, schedule=file, streams=None)
        assert_runs_like(target, source, model)


@pytest.mark.parametrize("policy", ["heft", "hios-lp", "search"])
def test_an_exported_schedule_comes_back_as_it_was(
    policy: str, spread: None, tiny: Path, tmp_path: Path
) -> None:
    target, again, file = (tmp_path / name for name in ("out.onnx", "again.onnx", "s.json"))
    assert optimized(tiny, target, policy=policy, streams=1).devices == GROUPS
    content = placements_to_json(inspect_model(target).annotation.placements)
    file.write_text(json.dumps(content))
    for source in (tiny, target):  # the file before optimize, and the optimized one
        optimized(source, again, schedule=file, device="auto", streams=None)
        assert placed(again) == placed(target)
    options = {"schedule": file, "device": "auto", "streams": None, "cache_dir": tmp_path / "kept"}
    assert not optimized(tiny, again, **options).from_cache
    assert optimized(tiny, again, **options).from_cache
    content["operators"][-1]["stream"] += 1
    file.write_text(json.dumps(content))
    assert not optimized(tiny, again, **options).from_cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "heft", "streams": None}, "--schedule and --policy contradict"),
        ({"streams": 2}, "--schedule and --streams contradict"),
        ({"streams": None, "device": "cpu"}, "on cpu:1, which --device does not name"),
    ],
)
def test_what_a_file_contradicts_is_refused(
    options: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    optimized(tiny, tmp_path / "out.onnx", policy="sequential", device="cpu")
    file = tmp_path / "s.json"
    file.write_text(json.dumps(random_schedule(tmp_path / "out.onnx", seed=1)))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=message):
        optimized(tiny, tmp_path / "new.onnx", schedule=file, **options)
    assert contents(tmp_path) == before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> tuple[Device, ...]:
    """Two GPUs that are the CPU, on which all operators are said to take the same."""

    def profiled(model: Model, *_: Any) -> Profile:
        names = [node.name for node in model.proto.graph.node]
        equal = dict.fromkeys(names, OperatorProfile((100.0,)))
        return Profile(equal, dict.fromkeys(names, "compute"), None, len(names))

    def time_launches_us(stream: Any, launch: Callable[[], None], count: int) -> tuple[float, ...]:
        return time_runs_us(launch, count)

    install(monkeypatch)
    monkeypatch.setattr(cuda, "time_launches_us", time_launches_us)
    monkeypatch.setattr(scheduling, "measure_profile", profiled)
    monkeypatch.setattr(scheduling, "lowered_model", lambda model, *_: model)
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: Rewrites())
    monkeypatch.setattr(scheduling, "measure_transfers", free_transfers)
    return (Device("cuda", 0), Device("cuda", 1))


@pytest.mark.parametrize("policy", ["auto", "hios-lp"])
@pytest.mark.parametrize("name", ["fork_join", "two_towers", "data_dependent", "views", "tiny"])
def test_gpus_are_scheduled_and_captured_together(
    name: str, policy: str, spread: None, gpus: tuple[Device, ...], tmp_path: Path
) -> None:
    proto = MODELS[name]() if name in MODELS else build("tiny")
    model = loaded(proto, tmp_path)
    machine = Machine(gpus, 1, dict.fromkeys(gpus, 1 << 20))
    decision, is_complete = scheduling.measured_decision(
        model,
        MeasurementCache(None, ""),
        run_plain(model, CPU, 0, ()),
        Request(policy, machine, 20.0, False, ()),
        None,
        lambda *_: None,
    )
    assert is_complete
    check_schedule(graph_from_model(model), machine, decision.schedule)
    assert policy == "auto" or decision.schedule.devices == gpus
    annotation = annotation_for(model, decision.schedule, decision.variant)
    with Session(model.proto, annotation) as session:
        assert session.refusal is None
        for seed in range(2):
            feeds = feeds_for(proto, seed)
            assert_close(session.run(None, feeds), reference(proto, feeds))


@pytest.mark.parametrize("split", [True, False])
def test_bands_of_rows_are_candidates_unless_they_are_unwanted(
    split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)

    def in_bands(outcomes: Sequence[Outcome], *rest: Any) -> Decision:
        ranked = sorted(outcomes, key=lambda o: (not o.samples_us, o.candidate.policy != "bands"))
        return decide(ranked, *rest)

    monkeypatch.setattr(scheduling, "decide", in_bands)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(build("squeezenet", image=64), source)
    steps: list[str] = []
    result = optimized(
        source, target, split=split, policy="heft", budget_s=8.0,
        progress=lambda what, done, total: steps.append(what),
    )  # fmt: skip
    assert ({"cutting bands", "duplicating operators"} <= set(steps)) == split
    tried = {entry["rewrite"] for entry in result.alternatives if entry["policy"] == "bands"}
    assert tried <= {"bands-2", "bands-half-2", "bands-prefix-2"}
    assert bool(tried) == split
    assert all(difference.is_within for difference in result.differences)
    if result.policy == "bands":
        feeds = feeds_for(onnx.load(source))
        with onnxsched.load(target) as session:
            assert_close(session.run(None, feeds), plain_outputs(source, feeds))


def test_bands_are_cut_from_the_best_form_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)
    alike = Rewrites(alike=("aligned",))
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: alike)
    monkeypatch.setattr(
        scheduling,
        "promising",
        lambda raced: [o for o in raced.alike if o.model.rewrite == "aligned"],
    )
    source = tmp_path / "in.onnx"
    onnx.save(build("squeezenet", image=64), source)
    result = optimized(source, tmp_path / "out.onnx", policy="heft", budget_s=20.0)
    tried = {entry["rewrite"] for entry in result.alternatives if entry["policy"] == "bands"}
    assert "aligned+bands-2" in tried
    assert all(name.startswith("aligned+bands-") for name in tried)
    assert all(difference.is_within for difference in result.differences)


def test_bands_that_ort_refuses_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)
    refused: list[str] = []

    def profiled(model: Model, *rest: Any) -> Profile:
        if "bands" in model.rewrite:
            refused.append(model.rewrite)
            raise ModelError("planted")
        return measure_profile(model, *rest)

    monkeypatch.setattr(scheduling, "measure_profile", profiled)
    source = tmp_path / "in.onnx"
    onnx.save(build("squeezenet", image=64), source)
    result = optimized(source, tmp_path / "out.onnx", policy="heft", budget_s=4.0)
    assert refused
    assert {entry["rewrite"] for entry in result.alternatives} == {"none"}


def test_a_form_that_the_model_can_do_without_may_fail_in_any_way(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny, Device("cpu"))
    request = Request("auto", Machine((Device("cuda"),), 2), 1.0, True, (), True)

    def failing(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise error

        return fail

    kernel = OnnxschedError("No kernel computes a convolution (planted).")
    monkeypatch.setattr(scheduling, "lowered_model", failing(kernel))
    assert scheduling._lowered(model, model.variant, request) is None
    assert scheduling._if_possible(failing(kernel), model) is None
    gone = failing(DeviceError("planted"))
    monkeypatch.setattr(scheduling, "lowered_model", gone)
    with pytest.raises(DeviceError, match="planted"):
        scheduling._lowered(model, model.variant, request)
    with pytest.raises(DeviceError, match="planted"):
        scheduling._if_possible(gone, model)
