"""Every distinct operator is measured once, and never again where the cache is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched.inputs import with_given
from onnxsched.loading import Model, graph_from_model
from onnxsched.profile import Profile
from onnxsched.profiling import measure, roofline
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.signature import OperatorSignatures
from onnxsched_runtime.session import OrtSession
from sample_models import build
from support.models import CPU, MODELS
from support.optimizing import loaded, parsed

ROOFLINE_COUNT = 2
"""Operators of the roofline, which are measured like those of the model."""


@pytest.fixture(autouse=True)
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every session that measuring opens; the roofline is small."""
    opened: list[Any] = []

    def opening(*arguments: Any) -> OrtSession:
        opened.append(arguments)
        return OrtSession(*arguments)

    monkeypatch.setattr(measure, "OrtSession", opening)
    monkeypatch.setitem(roofline._PRODUCT_SIZE, "cpu", 64)
    monkeypatch.setitem(roofline._PASS_COUNT, "cpu", 2**12)
    return opened


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path / "cache", "this machine")


def measured(model: Model, cache: MeasurementCache) -> Profile:
    return measure.measure_profile(model, CPU, cache, (), lambda what, done, total: None, None)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Six operators, of which three are the same Neg."""
    text = """(float[3] x, float[4] z) => (float[3] y, float[4] b) {
        a = Neg(x)
        c = Neg(a)
        d = Exp(c)
        e = Neg(d)
        y = Add(e, x)
        b = Neg(z)
    }"""
    return loaded(parsed(text), tmp_path)


def test_each_distinct_operator_is_run_once(
    model: Model, cache: MeasurementCache, sessions: list[Any]
) -> None:
    profile = measured(model, cache)
    assert profile.measured_count == 4
    assert len(sessions) == 4 + ROOFLINE_COUNT
    kinds = {node.name: node.op_type for node in model.proto.graph.node}
    shared = [p for name, p in profile.operators.items() if kinds[name] == "Neg"]
    assert len({id(p) for p in shared}) == 2


def test_every_operator_has_at_least_three_samples_and_a_cost(
    model: Model, cache: MeasurementCache
) -> None:
    profile = measured(model, cache)
    names = [operator.name for operator in graph_from_model(model).operators]
    assert profile.operators.keys() == profile.bounds.keys() == set(names)
    for name in names:
        assert len(profile.operators[name].samples_us) >= 3
        assert profile.cost(name).duration_us > 0
        assert profile.cost(name).block_share == 0
    assert profile.refusals == {}


def test_nothing_is_run_twice(model: Model, cache: MeasurementCache, sessions: list[Any]) -> None:
    first = measured(model, cache)
    sessions.clear()
    second = measured(model, cache)
    assert sessions == []
    assert (second.measured_count, second.operators) == (0, first.operators)


def test_without_a_cache_everything_is_run_again(model: Model, sessions: list[Any]) -> None:
    for _ in range(2):
        sessions.clear()
        assert measured(model, MeasurementCache(None, "this machine")).measured_count == 4
        assert len(sessions) == 4 + ROOFLINE_COUNT


def test_another_environment_is_measured_anew(model: Model, cache: MeasurementCache) -> None:
    measured(model, cache)
    other = MeasurementCache(cache.directory, "this machine with another driver")
    assert measured(model, other).measured_count == 4


def test_changed_entries_are_measured_again_never_trusted(
    model: Model, cache: MeasurementCache, sessions: list[Any]
) -> None:
    measured(model, cache)
    for file in (cache.directory or Path()).rglob("*.json"):
        entry = json.loads(file.read_text())
        entry["content"]["samples_us"] = [0.123]
        file.write_text(json.dumps(entry))
    sessions.clear()
    profile = measured(model, cache)
    assert len(sessions) == 4 + ROOFLINE_COUNT
    assert all(len(o.samples_us) >= 3 for o in profile.operators.values())


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        "text",
        {"samples_us": [-1.0], "kernels": [], "refusal": None},
        {"samples_us": [1.0], "kernels": [{}], "refusal": None},
    ],
)
def test_sound_entries_of_another_layout_are_measured_again(
    model: Model, cache: MeasurementCache, content: Any
) -> None:
    measured(model, cache)
    cache.write(OperatorSignatures(model).of(model.proto.graph.node[0]), content)
    assert measured(model, cache).measured_count == 1
    assert measured(model, cache).measured_count == 0


@pytest.mark.parametrize("name", ["branch", "loop", "sequence", "data_dependent"])
def test_operators_on_the_host_are_not_run_alone(
    name: str, cache: MeasurementCache, tmp_path: Path
) -> None:
    model = loaded(MODELS[name](), tmp_path)
    profile = measured(model, cache)
    assert model.host_reasons
    for node in model.proto.graph.node:
        on_host = node.name in model.host_reasons
        assert (profile.operators[node.name].samples_us == ()) == on_host
        assert (profile.cost(node.name).duration_us == 0) == on_host


def test_progress_counts_what_was_measured(tmp_path: Path, cache: MeasurementCache) -> None:
    told: list[tuple[str, int, int]] = []
    measure.measure_profile(
        loaded(build("tiny"), tmp_path), CPU, cache, (), lambda *step: told.append(step), None
    )
    assert {what for what, _, _ in told} == {"profiling operators"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert all(0 <= done < total for _, done, total in told)


def test_a_large_product_is_bound_by_compute_and_a_sum_by_memory(
    tmp_path: Path, cache: MeasurementCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    text = """(float[512,512] x, float[512,512] z) => (float[512,512] y, float[512,512] b) {
        [product] y = MatMul(x, z)
        [sum] b = Add(x, z)
    }"""
    profile = measured(loaded(parsed(text), tmp_path), cache)
    assert profile.bounds == {"product": "compute", "sum": "memory"}


@pytest.mark.parametrize(
    "text",
    [
        "(int64[3] x) => (int64[3] y) { d = Add(x, one)  y = Div(x, d) }",
        "(int64[3] x) => (int64[3] y) { d = Add(x, one)  y = Mod(x, d) }",
        """(int64[2] x, float[3] z) => (float[1,3] y) {
            a = Max(x, one)
            b = Concat<axis = 0>(one, three)
            s = Mul(a, b)
            y = Reshape(z, s)
        }""",
    ],
)
def test_divisors_and_shapes_are_what_the_model_computes(
    text: str, tmp_path: Path, cache: MeasurementCache
) -> None:
    model = parsed(text)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([value]), name)
        for name, value in (("one", 1), ("three", 3))
    )
    found = loaded(model, tmp_path)
    assert found.host_reasons == {}
    profile = measured(found, cache)
    assert all(operator.samples_us for operator in profile.operators.values())


def test_operators_read_the_inputs_that_were_given(
    tmp_path: Path, cache: MeasurementCache
) -> None:
    model = parsed(
        "(float[1,1,2] x, float[3] scales) => (float[2,1,2] y) { y = Resize(x, none, scales) }"
    )
    model.graph.node[0].input[1] = ""
    found = loaded(model, tmp_path)
    assert found.host_reasons == {}
    profile = measured(with_given(found, {"scales": np.array([2, 1, 1], np.float32)}), cache)
    assert all(operator.samples_us for operator in profile.operators.values())
