"""From a file to an annotated one that computes the same, or to nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxsched
from onnxsched import checking, decision, pipeline, profiling, scheduling, tuning
from onnxsched.comparison import Difference, Tolerances
from onnxsched.decision import decide
from onnxsched.environment import describe_environment
from onnxsched.inspection import inspect_model
from onnxsched.loading import load_model
from onnxsched.outcomes import Subject, Tuned
from onnxsched.policies import POLICIES
from onnxsched.proposals import Request
from onnxsched.rewriting import Rewrites
from onnxsched.tuning import tune
from onnxsched.verify import verify
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.errors import (
    DeviceError,
    ModelError,
    NumericsError,
    OnnxschedError,
    UsageError,
)
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from sample_models import build
from support.models import CPU, MODELS, Array, feeds_for, weight
from support.optimizing import assert_close, contents, parsed, plain_outputs, saved

SMALL: dict[str, dict[str, int]] = {
    "googlenet": {"image": 64},
    "inception_v3": {"image": 75},
    "squeezenet": {"image": 48},
    "nasnet_mobile": {"image": 32},
    "randwire": {"image": 32},
    "t5_encoder": {"sequence": 8},
    "t5_decoder": {"sequence": 8},
    "bert": {"sequence": 8},
    "deepfm": {},
    "tiny": {},
}
"""Sample models, as small as they can be built."""


def optimized(source: Path, target: Path | str, **options: Any) -> onnxsched.OptimizeResult:
    """What `optimize` returns on the CPU, where nothing is kept unless a cache is given."""
    return onnxsched.optimize(source, target, **{"device": "cpu", "cache_dir": None} | options)


def assert_runs_like(target: Path, source: Path, feeds: Mapping[str, Array]) -> None:
    """Load the annotated file, run it twice, and compare it with plain ONNX Runtime."""
    with onnxsched.load(target) as session:
        outputs = session.run(None, feeds)
        assert_close(outputs, plain_outputs(source, feeds))
        again = session.run(None, feeds)
    for one, other in zip(outputs, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return saved(build("tiny"), tmp_path, "tiny.onnx")


@pytest.mark.usefixtures("shallow_transformers")
@pytest.mark.parametrize("name", SMALL)
def test_every_sample_model_runs_on_several_streams_as_before(name: str, tmp_path: Path) -> None:
    model = build(name, **SMALL[name])
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    result = optimized(source, target, policy="nimble", streams=3)
    assert (result.policy, result.host_reasons) == ("nimble", {})
    assert 2 <= result.stream_count <= 3
    assert_runs_like(target, source, feeds_for(model, seed=11))
    found = verify(target, source, tolerances=Tolerances(1e-4), run_count=1, device="cpu")
    assert all(difference.is_within for difference in found)


def test_a_large_sample_model_does_so_too(tmp_path: Path) -> None:
    """Its weights alone are hundreds of megabytes, and there are some thousand operators."""
    model = build("nasnet_large", image=32)
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    feeds = feeds_for(model, seed=11)
    del model
    result = optimized(source, target, policy="nimble", streams=2)
    assert (result.policy, result.stream_count, result.host_reasons) == ("nimble", 2, {})
    assert_runs_like(target, source, feeds)


@pytest.mark.parametrize("policy", ["auto", *POLICIES])
@pytest.mark.parametrize("name", ["tiny", "deepfm"])
def test_every_policy_keeps_the_outputs(name: str, policy: str, tmp_path: Path) -> None:
    model = build(name)
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    result = optimized(source, target, policy=policy, streams=3)
    assert policy in ("auto", result.policy)
    assert_runs_like(target, source, feeds_for(model))


@pytest.mark.parametrize("policy", ["auto", "wavefront"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_keeps_its_outputs(name: str, policy: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    optimized(source, target, policy=policy, streams=3)
    with onnxsched.load(target) as session:
        for seed in range(4):
            feeds = feeds_for(model, seed)
            assert_close(session.run(None, feeds), plain_outputs(source, feeds))


def test_a_weight_that_nobody_reads_may_be_an_output(tmp_path: Path) -> None:
    model = parsed("(float[3] x) => (float[3] y, float[900] w) { y = Relu(x) }", w=weight(900))
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    optimized(source, target)
    assert_runs_like(target, source, feeds_for(model))


def test_the_result_says_what_was_written(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    steps: list[str] = []
    result = optimized(
        tiny, str(target), policy="opara", streams=2, seed=5,
        progress=lambda what, done, total: steps.append(what),
    )  # fmt: skip
    annotation = read_annotation(onnx.load(target))
    placements = annotation.placements
    assert (result.path, result.devices, result.policy) == (target, (CPU,), "opara")
    assert result.stream_count == len(set(placements.values())) == 2
    assert result.operator_count == len(placements)
    assert result.segment_count >= 3
    assert result.capture == "none"
    assert [d.output for d in result.differences] == ["logits"]
    assert all(d.is_within for d in result.differences)
    assert {a["policy"] for a in result.alternatives} == {"sequential", "opara"}
    assert not result.from_cache
    assert result.measured_us > 0
    assert result.sequential_us is not None
    assert result.sequential_us > 0
    assert steps[0] == "loading"
    assert "proposing schedules" in steps
    assert steps[-1] == "checking"
    details = annotation.details
    assert (details["policy"], details["streams"], details["seed"]) == ("opara", 2, 5)
    assert details["bound_shapes"] == {"input": [1, 3, 16, 16]}
    assert details["measured_us"] == result.measured_us
    assert details["operators"].keys() == placements.keys()
    assert details["environment"] == describe_environment(CPU)
    content = json.loads(json.dumps(result.to_json()))
    assert (content["schema_version"], content["devices"]) == (1, ["cpu:0"])


def test_symbolic_shapes_are_bound_in_what_is_written(tmp_path: Path) -> None:
    text = (
        "(float[n,3] x, float[n,3] z) => (float[n,3] y) { a = Exp(x)  b = Exp(z)  y = Add(a, b) }"
    )
    source, target = saved(parsed(text), tmp_path), tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="have no value"):
        optimized(source, target)
    optimized(source, target, shapes={"x": (5, 3)})
    with onnxsched.load(target) as session:
        assert [argument.shape for argument in session.get_inputs()] == [[5, 3], [5, 3]]


def test_a_model_can_be_optimized_again_and_again_in_its_place(tiny: Path, tmp_path: Path) -> None:
    model = build("tiny")
    original = saved(model, tmp_path, "original.onnx")
    for policy in ("nimble", "sequential", "auto"):
        optimized(tiny, tiny, policy=policy, streams=3)
        assert_runs_like(tiny, original, feeds_for(model))


def test_a_second_run_takes_the_decision_from_the_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = optimized(tiny, tmp_path / "first.onnx", cache_dir=tmp_path / "cache", streams=3)
    for what in ("measure_profile", "tune"):
        monkeypatch.delattr(scheduling, what)
    second = optimized(tiny, tmp_path / "second.onnx", cache_dir=tmp_path / "cache", streams=3)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.alternatives == first.alternatives
    one, other = (
        read_annotation(onnx.load(tmp_path / name)) for name in ("first.onnx", "second.onnx")
    )
    assert list(one.placements.items()) == list(other.placements.items())
    assert one.details == other.details


@pytest.mark.parametrize(
    "other",
    [{"policy": "heft"}, {"streams": 2}, {"variants": False}, {"cache_dir": None}],
    ids=str,
)
def test_another_question_is_decided_anew(
    other: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    target, options = tmp_path / "out.onnx", {"cache_dir": tmp_path / "cache", "streams": 3}
    optimized(tiny, target, **options)
    assert not optimized(tiny, target, **options | other).from_cache
    assert optimized(tiny, target, **options).from_cache


def test_a_decision_that_ctrl_c_cut_short_is_not_remembered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options = tmp_path / "out.onnx", {"cache_dir": tmp_path / "cache", "streams": 3}
    with monkeypatch.context() as patch:
        real = tune
        patch.setattr(
            scheduling, "tune", lambda *a, **k: replace(real(*a, **k), is_complete=False)
        )
        assert not optimized(tiny, target, **options).from_cache
        assert_runs_like(target, tiny, feeds_for(build("tiny")))
    assert not optimized(tiny, target, **options).from_cache
    assert optimized(tiny, target, **options).from_cache


@pytest.mark.parametrize("policy", ["auto", "search", "nimble"])
def test_a_policy_that_is_asked_for_is_not_searched_around(
    policy: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noted(*arguments: Any, **options: Any) -> Tuned:
        asked.append(options["is_refined"])
        return tune(*arguments, **options)

    monkeypatch.setattr(scheduling, "tune", noted)
    optimized(tiny, tmp_path / "out.onnx", policy=policy)
    assert asked == [policy != "nimble"]


NHWC = Variant("nhwc")


@pytest.fixture
def cpu_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU have variants: its provider has a blocked layout of its own to lower to."""
    monkeypatch.setattr(scheduling, "possible_variants", lambda *_: (DEFAULT_VARIANT, NHWC))
    monkeypatch.setattr(scheduling, "promising", lambda raced: raced.variants)


@pytest.mark.parametrize("policy", ["auto", "nimble"])
@pytest.mark.parametrize("name", ["tiny", "googlenet"])
def test_schedules_of_a_lowered_model_are_carried_to_the_file(
    name: str, policy: str, cpu_layouts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, **SMALL[name])
    source, target = saved(model, tmp_path), tmp_path / "out.onnx"
    monkeypatch.setattr(  # whichever is faster, the lowered one is to be written
        scheduling,
        "decide",
        lambda outcomes, *rest: decide(
            sorted(outcomes, key=lambda o: (not o.samples_us, o.form[0] != NHWC)), *rest
        ),
    )
    result = optimized(source, target, policy=policy, streams=3)
    written = onnx.load(target)
    annotation = read_annotation(written)
    assert {a["variant"] for a in result.alternatives} == {"nchw", "nhwc"}
    assert result.variant == annotation.variant == NHWC
    assert result.sequential_us == next(
        a["measured_us"]
        for a in result.alternatives
        if (a["policy"], a["variant"]) == ("sequential", "nchw")
    )
    assert annotation.details["operators"].keys() <= annotation.placements.keys()
    assert not any("nchwc" in node.domain for node in written.graph.node)
    assert_runs_like(target, source, feeds_for(model))


def test_without_the_default_variant_the_unscheduled_model_is_still_measured(
    cpu_layouts: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scheduling,
        "promising",
        lambda raced: [o for o in raced.variants if o.model.variant == NHWC],
    )
    result = optimized(tiny, tmp_path / "out.onnx", streams=2)
    default = [a["policy"] for a in result.alternatives if a["variant"] == "nchw"]
    assert default == ["sequential"]


def test_variants_can_be_turned_off(
    cpu_layouts: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(scheduling, "race_variants")
    result = optimized(tiny, tmp_path / "out.onnx", variants=False)
    assert {a["variant"] for a in result.alternatives} == {"nchw"}


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU have a rewrite, and whichever is faster chooses it."""
    both = Rewrites(merged=("merge-inner", "merge"))
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: both)
    monkeypatch.setattr(
        scheduling, "promising", lambda raced: (raced.variants[0], *reversed(raced.merged))
    )
    monkeypatch.setattr(
        tuning,
        "_finalists",
        lambda ranked: [o for o in ranked if o.candidate.policy == "sequential"],
    )
    monkeypatch.setattr(
        scheduling,
        "decide",
        lambda outcomes, *rest: decide(
            sorted(outcomes, key=lambda o: (not o.samples_us, o.form[1] != "merge")), *rest
        ),
    )


@pytest.mark.parametrize("variant", [DEFAULT_VARIANT, NHWC], ids=str)
@pytest.mark.parametrize("name", ["tiny", "googlenet"])
def test_a_rewrite_is_written_recalled_and_loaded(
    name: str, variant: Variant, merged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "possible_variants", lambda *_: (variant,))
    model = build(name, **SMALL[name])
    source, target, again = saved(model, tmp_path), tmp_path / "out.onnx", tmp_path / "again.onnx"
    options = {"streams": 3, "cache_dir": tmp_path / "cache"}
    result = optimized(source, target, **options)
    assert (result.rewrite, result.variant) == ("merge", variant)
    assert {a["rewrite"] for a in result.alternatives} == {"none", "merge-inner", "merge"}
    assert result.sequential_us == next(
        a["measured_us"]
        for a in result.alternatives
        if (a["policy"], a["variant"], a["rewrite"]) == ("sequential", "nchw", "none")
    )
    written = onnx.load(target)
    names = [node.name for node in written.graph.node]
    assert any(node_name.endswith("/merged") for node_name in names)
    annotation = read_annotation(written)
    assert annotation.details["rewrite"] == inspect_model(target).to_json()["rewrite"] == "merge"
    assert annotation.placements.keys() == set(names) >= annotation.details["operators"].keys()
    assert not any("nchwc" in node.domain for node in written.graph.node)
    assert_runs_like(target, source, feeds_for(model, seed=4))
    monkeypatch.delattr(scheduling, "tune")
    second = optimized(source, again, **options)
    assert (second.from_cache, second.rewrite) == (True, "merge")
    assert again.read_bytes() == target.read_bytes()


def test_what_is_predicted_shortest_is_tried_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortest: list[float] = []

    def tuned(subjects: Sequence[Subject], *arguments: Any, **options: Any) -> Tuned:
        for subject in subjects:
            shortest.append(min(candidate.predicted_us for candidate in subject.candidates))
        return tune(subjects, *arguments, **options)

    both = Rewrites(merged=("merge", "late-bias"))
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: both)
    monkeypatch.setattr(scheduling, "promising", lambda raced: raced.merged)
    monkeypatch.setattr(scheduling, "tune", tuned)
    optimized(tiny, tmp_path / "out.onnx", streams=3)
    assert len(shortest) == 3
    assert shortest == sorted(shortest)


@pytest.mark.parametrize(("count", "budget_s"), [(5, 30.0), (360, 30.0), (600, 50.0)])
def test_large_models_have_more_time(
    count: int, budget_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    ends = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [2]) for i in (0, count)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17)]
    source = saved(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path)
    asked: list[float] = []

    def decided(*arguments: Any) -> Any:
        asked.extend(a.budget_s for a in arguments if isinstance(a, Request))
        return measured_decision(*arguments)

    measured_decision = scheduling.measured_decision
    monkeypatch.setattr(pipeline, "measured_decision", decided)
    optimized(source, tmp_path / "out.onnx", policy="sequential")
    assert asked == [budget_s]


def test_a_cpu_has_no_rewrites_and_without_variants_there_are_none(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = optimized(tiny, tmp_path / "out.onnx")
    assert {a["rewrite"] for a in result.alternatives} == {"none"}
    monkeypatch.setattr(scheduling, "possible_rewrites", lambda *_: Rewrites(merged=("merge",)))
    monkeypatch.delattr(scheduling, "race_variants")
    assert optimized(tiny, tmp_path / "out.onnx", variants=False).rewrite == "none"


def test_another_model_is_measured_only_where_it_differs(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    optimized(tiny, tmp_path / "out.onnx", cache_dir=cache)
    before = contents(cache)
    wider = saved(build("tiny", batch=2), tmp_path)
    assert not optimized(wider, tmp_path / "out.onnx", cache_dir=cache).from_cache
    assert before.items() <= contents(cache).items()


def test_the_users_cache_is_the_default(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling.cache, "default_directory", lambda: tmp_path / "users")
    optimized(tiny, tmp_path / "out.onnx", cache_dir="")
    assert contents(tmp_path / "users")


def test_nothing_is_written_when_numbers_differ(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "out.onnx").write_bytes(b"as it was")
    monkeypatch.setattr(
        checking, "compare", lambda *_: (Difference("logits", 0.5, 0.25, False, False),)
    )
    with pytest.raises(NumericsError, match=r"'logits' differs .* 0\.5 .*nothing was") as caught:
        optimized(tiny, folder / "out.onnx")
    assert caught.value.exit_code == 3
    assert (folder / "out.onnx").read_bytes() == b"as it was"
    assert list(folder.iterdir()) == [folder / "out.onnx"]


def test_a_schedule_that_computes_something_else_is_noticed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_other_weights(*arguments: Any) -> Any:
        model = load_model(*arguments)
        weight = max(model.proto.graph.initializer, key=lambda w: w.ByteSize())
        weight.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name)
        )
        return model

    monkeypatch.setattr(pipeline, "load_model", with_other_weights)
    with pytest.raises(NumericsError, match="'logits' differs"):
        optimized(tiny, tmp_path / "out.onnx", policy="nimble", streams=2)
    assert not (tmp_path / "out.onnx").exists()


def test_outputs_that_random_numbers_reach_are_not_compared(tmp_path: Path) -> None:
    text = """(float[9] x) => (float[9] y, float[9] z) {
        a = Exp(x)
        b = Neg(a)
        c = RandomNormalLike(b)
        y = Add(c, a)
        z = Sin(b)
    }"""
    source, target = saved(parsed(text), tmp_path), tmp_path / "out.onnx"
    result = optimized(source, target, policy="wavefront", streams=2)
    assert [difference.output for difference in result.differences] == ["z"]
    (reason,) = result.host_reasons.values()
    assert reason == "RandomNormalLike draws numbers that a replay would repeat"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "magic"}, UsageError, "no policy 'magic'; there are auto, sequential, "),
        ({"streams": 0}, UsageError, "--streams 0 is no number from 1"),
        ({"device": "tpu"}, UsageError, "'tpu' is no device"),
        ({"device": "cpu:1"}, DeviceError, "the CPU is cpu:0"),
        ({"device": "cuda:99"}, DeviceError, "cuda:99 is not available"),
        ({"device": "cpu:0,cpu:2"}, DeviceError, "groups of its threads are numbered from"),
        ({"device": "cuda:98,cuda:99"}, DeviceError, "cuda:98 is not available"),
        ({"device": "cpu:0,cpu:0"}, UsageError, "names cpu:0 twice"),
        ({"device": "cpu,cpu:1,cuda:0"}, UsageError, "mixes cpu:0 and cuda:0"),
        ({"device": "cpu:0,"}, UsageError, "'' is no device"),
        ({"shapes": {"input": (1, 2)}}, UsageError, "2 dimensions, it has 4"),
        ({"custom_ops": ["/nowhere.so"]}, UsageError, "library '/nowhere.so' does not load"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    options: dict[str, Any], error: type[OnnxschedError], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        optimized(tiny, tmp_path / "out.onnx", **options)
    assert contents(tmp_path).keys() == {"tiny.onnx"}


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (lambda folder: folder / "none" / "out.onnx", UsageError),
        (lambda folder: folder, UsageError),
        (lambda folder: Path("/dev/null"), OnnxschedError),
    ],
    ids=["no folder", "a folder", "a device"],
)
def test_a_target_that_takes_no_file_is_refused(
    target: Callable[[Path], Path], error: type[OnnxschedError], tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        optimized(tiny, target(tmp_path))
    assert contents(tmp_path).keys() == {"tiny.onnx"}


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"in\.onnx' can't be read as an ONNX model"):
        optimized(tmp_path / "in.onnx", tmp_path / "out.onnx")


def test_a_decision_is_for_the_inputs_that_were_given(tmp_path: Path) -> None:
    source = saved(parsed("(float[3] x) => (float[3] y) { y = Neg(x) }"), tmp_path)
    kept: dict[str, Any] = {"cache_dir": tmp_path / "cache", "budget_s": 0}
    first = {"x": np.array([1, 2, 3], np.float32)}
    other = {"x": np.array([1, 2, 4], np.float32)}
    found = [
        optimized(source, tmp_path / "out.onnx", inputs=given, **kept).from_cache
        for given in (None, first, first, other)
    ]
    assert found == [False, False, True, False]


def test_strings_are_known_again_by_what_they_say() -> None:
    one, same, other = (
        np.array(["".join(word) for word in ("ab", "cd", last)], object)
        for last in ("e", "e", "f")
    )
    assert decision._content(one) == decision._content(same) != decision._content(other)
