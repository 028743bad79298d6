"""Other layouts and precisions compute the same within rounding, and are chosen by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import onnxsched
from onnxsched.checking import differences_from, run_plain
from onnxsched.inputs import random_inputs
from onnxsched.loading import Model, load_model
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.isolation import ProfilingWorker
from onnxsched.profiling.measure import measure_profile
from onnxsched.rewriting import joined, possible_rewrites, rewritten
from onnxsched.variant_racing import race_variants
from onnxsched.variants import possible_variants
from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.files import read_model
from onnxsched_runtime.load import Session
from onnxsched_runtime.lowering import lower, origins
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

Zoo = Callable[[str], Path]
_CUDA = Device("cuda")


def _quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def nhwc(zoo: Zoo, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GoogLeNet in what is measured to be its fastest variant."""
    target = tmp_path_factory.mktemp("variants") / "out.onnx"
    result = onnxsched.optimize(
        zoo("googlenet"), target, device="cuda:0", cache_dir=cache_dir, budget_s=20.0
    )
    assert result.variant.layout == "nhwc"
    assert result.capture == "whole"
    assert all(difference.is_within for difference in result.differences)
    return target


def test_the_file_stays_portable_and_loads_on_the_cpu(nhwc: Path) -> None:
    model = read_model(nhwc)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx", "com.microsoft"}
    feeds = random_inputs(model, read_annotation(model).tensors, 0)
    with (
        onnxsched.load(nhwc, device_map={"cuda:0": "cpu:0"}) as session,
        OrtSession(nhwc, SessionSettings(Device("cpu"))) as plain,
    ):
        np.testing.assert_allclose(
            session.run(None, feeds)[0], plain.run(feeds)[0], rtol=1e-3, atol=1e-5
        )


def test_two_hundred_replays_with_changing_inputs_stay_right(nhwc: Path) -> None:
    model = read_model(nhwc)
    tensors = read_annotation(model).tensors
    source = ModelSource(model, tensors)
    with (
        onnxsched.load(nhwc) as session,
        OrtSession(source.whole(), SessionSettings(_CUDA)) as plain,
    ):
        for seed in range(200):
            feeds = random_inputs(model, tensors, seed)
            (actual,), (expected,) = session.run(None, feeds), plain.run(feeds)
            assert np.abs(actual - expected).max() <= 2e-3 * np.abs(expected).max()


def test_lowering_keeps_the_names_of_what_it_does_not_add(zoo: Zoo) -> None:
    model = load_model(zoo("squeezenet"), _CUDA)
    source = ModelSource(model.proto, model.tensors, Variant("nhwc"))
    lowered = lower(source, _CUDA)
    origin = origins(model.proto, lowered.model)
    strangers = [n.op_type for n in lowered.model.graph.node if n.name not in origin]
    assert set(strangers) <= {"Transpose", "Reshape"}
    assert "Transpose" in strangers
    assert set(origin.values()) == {node.name for node in model.proto.graph.node}
    default = lower(ModelSource(model.proto, model.tensors), _CUDA)
    names = {node.name for node in default.model.graph.node}
    assert names == {node.name for node in model.proto.graph.node}


def _refusals(lowered: Model, cache: MeasurementCache) -> Mapping[str, str]:
    with ProfilingWorker() as worker:
        return measure_profile(lowered, _CUDA, cache, (), _quiet, worker).refusals


def test_only_variants_that_are_right_take_part(zoo: Zoo) -> None:
    cache = MeasurementCache(None, "")
    model = load_model(zoo("squeezenet"), _CUDA)
    plain = run_plain(model, _CUDA, 0, ())
    found = race_variants(
        model, _CUDA, possible_variants(model, _CUDA),
        lambda variant: possible_rewrites(model, _CUDA, variant), plain,
        refusals_of=lambda lowered: _refusals(lowered, cache),
        budget_s=60.0, custom_ops=(), progress=_quiet,
    )  # fmt: skip
    variants = [outcome.model.variant for outcome in found.variants]
    assert DEFAULT_VARIANT in variants
    assert any(variant.fuses for variant in variants)
    assert all(variant.fuses or variant.layout == "nchw" for variant in variants)
    for raced in (found.variants, found.alike, found.merged):
        assert list(raced) == sorted(raced, key=lambda outcome: outcome.median_us)
    rewrites = {outcome.model.rewrite for outcome in found.alike}
    assert rewrites == {"none", "aligned", "aligned+folded"}
    base = found.alike[0].model
    rewrites = {outcome.model.rewrite for outcome in found.merged}
    assert rewrites == {base.rewrite, joined(base.rewrite, "merge-padded")}
    assert {o.model.variant for o in (*found.alike, *found.merged)} == {base.variant}


@pytest.mark.parametrize(
    ("name", "variant", "alike", "merged"),
    [
        ("googlenet", Variant("nhwc", fuse_conv_bias=True),
         {"aligned", "aligned+folded"}, {"merge", "merge-inner"}),
        ("googlenet", Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic", fuses=True),
         {"aligned", "aligned+folded"}, {"merge", "merge-inner"}),
        ("googlenet", DEFAULT_VARIANT, set(), {"merge", "merge-inner"}),
        ("t5_encoder", DEFAULT_VARIANT, {"transposed"}, {"merge"}),
        ("randwire", DEFAULT_VARIANT, set(), {"late-bias"}),
    ],
)  # fmt: skip
def test_rewrites_are_right_where_they_are_captured(
    name: str,
    variant: Variant,
    alike: set[str],
    merged: set[str],
    zoo: Zoo,
    cache_dir: Path,
) -> None:
    """Among them Splits into unequal pieces, whose sizes ORT copies to the device."""
    model = load_model(zoo(name), _CUDA)
    cache = MeasurementCache(cache_dir, "rewrites")
    found = race_variants(
        model, _CUDA, (variant,), lambda variant: possible_rewrites(model, _CUDA, variant),
        run_plain(model, _CUDA, 0, ()),
        refusals_of=lambda lowered: _refusals(lowered, cache),
        budget_s=120.0, custom_ops=(), progress=_quiet,
    )  # fmt: skip
    base = found.alike[0].model.rewrite
    assert {outcome.model.rewrite for outcome in found.alike} == {"none", *alike}
    assert {o.model.rewrite for o in found.merged} == {base, *(joined(base, m) for m in merged)}


def test_biases_that_wait_are_kernels_less(zoo: Zoo) -> None:
    model = load_model(zoo("randwire"), _CUDA)
    counts = []
    for rewrite in ("none", "late-bias"):
        portable = rewritten(model, rewrite)
        names = [node.name for node in portable.proto.graph.node]
        annotation = Annotation(dict.fromkeys(names, Placement(_CUDA, 0)), portable.tensors, {})
        with Session(portable.proto, annotation) as session:
            counts.append(_kernel_count(session))
    assert counts[1] <= counts[0] - 140


def _kernel_count(session: Session) -> int:
    executor = session.executor
    assert isinstance(executor, StreamExecutor)
    assert executor._pieces is not None
    return sum(graph.node_kinds["KERNEL"] for graph in executor._pieces.plain.values())


@pytest.mark.alone
def test_half_precision_is_faster_and_near(zoo: Zoo, nhwc: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.onnx"
    result = onnxsched.optimize(
        zoo("googlenet"), target, device="cuda:0", cache_dir=None, budget_s=45.0, precision="fp16"
    )
    assert all(0 < difference.relative < 1e-2 for difference in result.differences)
    single = read_annotation(read_model(nhwc)).details["measured_us"]
    assert result.measured_us < single
    model = load_model(zoo("googlenet"), _CUDA, precision="fp16")
    plain = run_plain(model, _CUDA, 1, ())
    with onnxsched.load(target) as session:
        assert all(found.is_within for found in differences_from(model, session, plain))
