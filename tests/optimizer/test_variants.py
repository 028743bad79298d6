"""Variants are tried where they can matter, and those that are wrong or refused are dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched import variant_racing
from onnxsched.checking import PlainRuns
from onnxsched.loading import Model, with_refusals
from onnxsched.rewriting import Rewrites
from onnxsched.variant_racing import Raced, VariantOutcome, promising, race_variants
from onnxsched.variants import lowered_model, possible_variants
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError, OnnxschedError
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import CPU, MODELS
from support.optimizing import as_it_is, loaded
from support.strategies import GPU

Form = Variant | str
NHWC, BIAS, BOTH = Variant("nhwc"), Variant(fuse_conv_bias=True), Variant("nhwc", True)
FUSED = replace(NHWC, fuses=True)


def test_only_convolutions_on_a_gpu_have_a_choice() -> None:
    convolutional = as_it_is(MODELS["fork_join"]())
    found = possible_variants(convolutional, GPU)
    assert found[0] == DEFAULT_VARIANT
    assert len(set(found)) == len(found) > 1
    assert {variant.layout for variant in found} == {"nchw", "nhwc"}
    assert all(variant.tf32 for variant in found), "TF32 would change results"
    assert possible_variants(convolutional, CPU) == (DEFAULT_VARIANT,)
    assert possible_variants(as_it_is(MODELS["chain"]()), GPU) == (DEFAULT_VARIANT,)
    name = convolutional.proto.graph.node[0].name
    with_host = replace(convolutional, host_reasons={name: "a loop"})
    assert possible_variants(with_host, GPU) == (DEFAULT_VARIANT,)


def outcome(variant: Variant, *samples_us: float, rewrite: str = "none") -> VariantOutcome:
    proto = onnx.ModelProto()
    model = Model(proto, {}, {}, {}, proto, variant, rewrite=rewrite)
    return VariantOutcome(model, model, samples_us)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], []),
        ([outcome(NHWC, 111.0)], [NHWC]),
        ([outcome(NHWC, 90.0, 111.0, 500.0)], [NHWC]),
        ([outcome(NHWC, 113.0)], []),
        ([outcome(BIAS, 101.0)], []),
        ([outcome(BIAS, 101.0), outcome(BOTH, 102.0), outcome(NHWC, 103.0)], [BOTH]),
    ],
)
def test_the_fastest_is_scheduled_and_one_of_another_layout_that_is_near(
    others: list[VariantOutcome], expected: list[Variant]
) -> None:
    fastest = outcome(DEFAULT_VARIANT, 50.0, 100.0, 200.0)
    found = promising(Raced((fastest, *others), (fastest,), (fastest,)))
    assert found[0] == fastest
    assert [o.model.variant for o in found[1:]] == expected


@pytest.mark.parametrize(
    ("times_us", "expected"),
    [
        ({"none": 100.0}, []),
        ({"none": 100.0, "merge": 111.0}, ["merge"]),
        ({"none": 100.0, "merge": 113.0}, []),
        ({"merge": 50.0, "none": 100.0}, ["merge"]),
        ({"merge": 50.0, "merge-inner": 57.0, "none": 100.0}, ["merge"]),
        ({"a": 97.0, "b": 98.0, "c": 99.0, "none": 100.0}, ["a", "b"]),
    ],
)
def test_rewrites_are_scheduled_that_are_the_fastest_or_near_beside_the_model_as_it_is(
    times_us: dict[str, float], expected: list[str]
) -> None:
    rewrites = tuple(outcome(NHWC, us, rewrite=name) for name, us in times_us.items())
    variants = (outcome(NHWC, 101.0), outcome(DEFAULT_VARIANT, 105.0))
    found = promising(Raced(variants, variants[:1], rewrites))
    assert (found[0], found[-1]) == (variants[0], variants[1])
    assert [o.model.rewrite for o in found[1:-1]] == expected


def test_the_best_that_leaves_operators_side_by_side_takes_the_place_of_the_model_as_it_is() -> (
    None
):
    plain, other = outcome(NHWC, 100.0), outcome(DEFAULT_VARIANT, 105.0)
    alike = (outcome(NHWC, 90.0, rewrite="aligned"), plain)
    merged = (outcome(NHWC, 60.0, rewrite="aligned+merge"), outcome(NHWC, 91.0, rewrite="aligned"))
    found = promising(Raced((plain, other), alike, merged))
    assert [o.model.form for o in found] == [
        (NHWC, "aligned"), (NHWC, "aligned+merge"), (DEFAULT_VARIANT, "none"),
    ]  # fmt: skip


class FakeSession:
    """Answers what the plan of its variant says, or that of its rewrite."""

    device = GPU
    planned: dict[Form, Any]
    is_open: dict[Form, bool]
    rewrites: dict[int, str]

    def __init__(self, proto: Any, annotation: Annotation, lowered: Any, **_: Any) -> None:
        assert lowered.variant == annotation.variant
        assert {str(p) for p in annotation.placements.values()} == {"cuda:0/0"}
        self.variant = annotation.variant
        rewrite = self.rewrites[id(proto)]
        self.form = self.variant if rewrite == "none" else rewrite
        self.plan = self.planned.get(self.form, 0.0)
        if self.plan == "slow":
            time.sleep(0.7)
        if self.plan == "session refused":
            raise OnnxschedError("ONNX Runtime failed: planted.")
        self.refusal = "whole: no" if self.plan == "not captured" else None
        self.is_open[self.form] = True

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.plan == "run fails":
            raise OnnxschedError("ONNX Runtime failed: planted.")
        right = feeds["x"] * 2
        return [right + (0.1 if self.plan == "wrong" else 0)]

    def close(self) -> None:
        self.is_open[self.form] = False


TIMES_US: dict[Form, tuple[float, ...]] = {
    DEFAULT_VARIANT: (30.0, 31.0), NHWC: (10.0, 11.0), BIAS: (20.0, 21.0), FUSED: (9.0, 9.5),
    "merge": (15.0, 16.0), "merge-inner": (5.0, 6.0),
    "transposed": (8.0, 9.0), "aligned": (12.0, 13.0),
    "transposed+merge": (7.0, 8.0), "transposed+merge-inner": (9.0, 10.0),
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Form, Any]]:
    """What goes wrong with which variant or rewrite; all sessions are closed in the end."""
    plan: dict[Form, Any] = {}
    is_open: dict[Form, bool] = {}
    rewrites: dict[int, str] = {}
    members = {"planned": plan, "is_open": is_open, "rewrites": rewrites}
    kind = type("Planned", (FakeSession,), members)

    def lower(model: Model, variant: Variant, device: Device, _: Any) -> Model:
        rewrites[id(model.proto)] = model.rewrite
        fault = plan.get(variant if model.rewrite == "none" else model.rewrite)
        if fault == "refused":
            raise ModelError("ONNX Runtime refuses the model: planted.")
        if fault == "no device":
            raise DeviceError("planted")
        return replace(model, variant=variant)

    def race(sessions: Sequence[FakeSession], feeds: Any, progress: Any) -> list[Any]:
        assert all(session.is_open[session.form] for session in sessions)
        return [TIMES_US[session.form] for session in sessions]

    monkeypatch.setattr(variant_racing, "lowered_model", lower)
    monkeypatch.setattr(variant_racing, "Session", kind)
    monkeypatch.setattr(variant_racing, "race", race)
    yield plan
    assert not any(is_open.values())


def race_both(
    wanted: Sequence[Variant],
    merged: Sequence[str],
    budget_s: float = 60.0,
    refusals_of: Callable[[Model], Mapping[str, str]] = lambda lowered: {},
    alike: Sequence[str] = (),
) -> tuple[list[Variant], list[str]]:
    """The variants that are right and the rewrites that are, the fastest first."""
    feeds = tuple({"x": np.full(3, seed, np.float32)} for seed in range(1, 3))
    exact = tuple([feed["x"] * 2] for feed in feeds)
    plain = PlainRuns(("y",), feeds, exact, lambda: exact)
    rewrites = Rewrites(tuple(alike), tuple(merged))
    found = race_variants(
        as_it_is(MODELS["chain"]()), GPU, wanted, lambda variant: rewrites, plain,
        refusals_of=refusals_of, budget_s=budget_s, custom_ops=(),
        progress=lambda what, done, total: None,
    )  # fmt: skip
    assert all(o.samples_us == TIMES_US[o.model.variant] for o in found.variants)
    both = (*found.alike, *found.merged)
    assert {o.model.variant for o in both} == {found.variants[0].model.variant}
    assert all(o.portable.rewrite == o.model.rewrite for o in (*found.variants, *both))
    names = [o.model.rewrite for o in found.alike]
    assert {"none"} <= set(names) <= {"none", *alike}
    assert names[0] in [o.model.rewrite for o in found.merged]
    return [o.model.variant for o in found.variants], [o.model.rewrite for o in found.merged]


def raced(*wanted: Variant, budget_s: float = 60.0) -> list[Variant]:
    variants, rewrites = race_both(wanted, (), budget_s)
    assert rewrites == ["none"]
    return variants


ALL = (DEFAULT_VARIANT, BIAS, NHWC)


def test_the_fastest_comes_first(planned: dict[Form, Any]) -> None:
    assert raced(*ALL) == [NHWC, BIAS, DEFAULT_VARIANT]


@pytest.mark.parametrize(
    "fault", ["wrong", "refused", "session refused", "run fails", "not captured"]
)
@pytest.mark.parametrize(
    "culprits", [culprits for n in (1, 2) for culprits in combinations((BIAS, NHWC), n)]
)
def test_what_is_wrong_or_refused_is_dropped(
    fault: str, culprits: tuple[Variant, ...], planned: dict[Form, Any]
) -> None:
    planned.update(dict.fromkeys(culprits, fault))
    expected = [v for v in (NHWC, BIAS, DEFAULT_VARIANT) if v not in culprits]
    assert raced(*ALL) == expected


@pytest.mark.parametrize("fault", [None, "wrong", "refused"])
def test_sessions_channels_last_are_tried_where_fused_convolutions_are_not_right(
    fault: str | None, planned: dict[Form, Any]
) -> None:
    planned[FUSED] = fault
    expected = [FUSED, BIAS, DEFAULT_VARIANT] if fault is None else [NHWC, BIAS, DEFAULT_VARIANT]
    assert raced(DEFAULT_VARIANT, FUSED, BIAS, NHWC) == expected


@pytest.mark.parametrize("fault", ["refused", "session refused"])
def test_the_first_must_work(fault: str, planned: dict[Form, Any]) -> None:
    planned[DEFAULT_VARIANT] = fault
    with pytest.raises(OnnxschedError, match="planted"):
        raced(*ALL)


@pytest.mark.parametrize("variant", ALL)
def test_a_device_that_is_not_there_is_an_error(
    variant: Variant, planned: dict[Form, Any]
) -> None:
    planned[variant] = "no device"
    with pytest.raises(DeviceError, match="planted"):
        raced(*ALL)


def test_what_takes_long_to_prepare_is_dropped_but_for_the_first(
    planned: dict[Form, Any],
) -> None:
    planned[NHWC] = "slow"
    assert raced(*ALL, budget_s=2.0) == [BIAS, DEFAULT_VARIANT]
    assert raced(*ALL, budget_s=10.0) == [NHWC, BIAS, DEFAULT_VARIANT]
    planned[DEFAULT_VARIANT] = "slow"
    assert raced(*ALL, budget_s=2.0) == [BIAS, DEFAULT_VARIANT]


def test_a_rewrite_may_take_as_long_to_prepare_as_the_model_itself(
    planned: dict[Form, Any],
) -> None:
    planned["merge"] = "slow"
    assert race_both([DEFAULT_VARIANT], ("merge",), budget_s=2.0)[1] == ["none"]
    planned[DEFAULT_VARIANT] = "slow"
    found = race_both([DEFAULT_VARIANT], ("merge",), budget_s=2.0)
    assert found == ([DEFAULT_VARIANT], ["merge", "none"])


def test_a_spent_budget_leaves_the_first(planned: dict[Form, Any]) -> None:
    assert raced(*ALL, budget_s=-1.0) == [DEFAULT_VARIANT]


def test_rewrites_are_raced_with_the_fastest_variant(planned: dict[Form, Any]) -> None:
    both = ("merge", "merge-inner")
    assert race_both(ALL, both) == (
        [NHWC, BIAS, DEFAULT_VARIANT],
        ["merge-inner", "none", "merge"],
    )
    planned[NHWC] = "wrong"
    assert race_both(ALL, both)[1] == ["merge-inner", "merge", "none"]


def test_what_merges_is_raced_on_top_of_the_best_that_does_not(planned: dict[Form, Any]) -> None:
    both, alike = ("merge", "merge-inner"), ("aligned", "transposed")
    assert race_both(ALL, both, alike=alike)[1] == [
        "transposed+merge", "transposed", "transposed+merge-inner",
    ]  # fmt: skip
    assert race_both(ALL, (), alike=alike)[1] == ["transposed"]
    assert race_both(ALL, (), alike=alike[:1])[1] == ["none"]
    planned["transposed"] = "wrong"
    assert race_both(ALL, both, alike=alike)[1] == ["merge-inner", "none", "merge"]


@pytest.mark.parametrize(
    "fault", ["wrong", "refused", "session refused", "run fails", "not captured"]
)
def test_a_rewrite_that_is_wrong_or_refused_is_dropped(
    fault: str, planned: dict[Form, Any]
) -> None:
    planned["merge"] = fault
    assert race_both(ALL, ("merge", "merge-inner"))[1] == ["merge-inner", "none"]
    planned["merge-inner"] = fault
    assert race_both(ALL, ("merge", "merge-inner"))[1] == ["none"]
    assert race_both(ALL, ("merge",), budget_s=-1.0) == ([DEFAULT_VARIANT], ["none"])


def test_a_rewrite_with_an_operator_that_is_not_captured_is_dropped(
    planned: dict[Form, Any],
) -> None:
    asked = []

    def refusals_of(lowered: Model) -> Mapping[str, str]:
        asked.append(lowered.form)
        time.sleep(0.7)  # which is not on the budget
        return {"split": "ends the process"} if lowered.rewrite == "merge" else {}

    found = race_both(ALL, ("merge", "merge-inner"), 1.0, refusals_of)
    assert found[1] == ["merge-inner", "none"]
    assert asked == [(NHWC, "merge"), (NHWC, "merge-inner")]


def test_that_is_known_before_a_rewrite_is_captured(planned: dict[Form, Any]) -> None:
    def refusals_of(lowered: Model) -> Mapping[str, str]:
        planned["merge"] = "session refused"
        return {}

    assert race_both(ALL, ("merge",), refusals_of=refusals_of)[1] == ["none"]


def test_a_lowered_model_keeps_what_it_is_compared_with(tmp_path: Path) -> None:
    model = loaded(MODELS["fork_join"](), tmp_path)
    lowered = lowered_model(model, NHWC, CPU, ())
    assert lowered.variant == NHWC
    assert lowered.proto != model.proto
    assert (lowered.baseline, lowered.bound_shapes) == (model.baseline, model.bound_shapes)
    on_host = with_refusals(model, {model.proto.graph.node[0].name: "planted"})
    same = lowered_model(on_host, BIAS, Device("cuda"), ())
    assert (same.proto, same.variant) == (model.proto, BIAS)
