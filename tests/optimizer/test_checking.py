"""When outputs count as those of plain ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from onnxsched import checking
from onnxsched.checking import (
    PlainRuns,
    check_numerics,
    check_portable,
    differences_from,
    run_plain,
)
from onnxsched.comparison import Tolerances, difference
from onnxsched.loading import Model
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError, NumericsError
from onnxsched_runtime.load import Session
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from support.models import CPU, MODELS
from support.optimizing import as_it_is
from support.strategies import GPU

EXACT = np.array([1.0, -0.5, 1e-3], np.float32)


@dataclass
class FakeSession:
    """Returns the exact outputs, and something more."""

    more: float
    kind: type = np.float32
    device: Device = field(default_factory=lambda: Device("cuda", 0))

    def run(self, names: Any, feeds: Any) -> list[Any]:
        return [(EXACT + np.float32(self.more)).astype(self.kind)]


def runs(rounded: float) -> PlainRuns:
    """Plain ORT that is so far from what it computes rounded otherwise."""
    return PlainRuns(("y",), ({},), ([EXACT + np.float32(rounded)],), lambda: ([EXACT],))


def is_within(more: float, plain: PlainRuns, model_name: str = "chain") -> bool:
    model = as_it_is(MODELS[model_name]())
    session = cast(Session, FakeSession(more))
    (found,) = differences_from(model, session, plain)
    return found.is_within


@pytest.mark.parametrize(
    ("more", "rounded", "expected"),
    [
        (0.0009, 0.0, True),  # within a thousandth of the largest value
        (0.0030, 0.0, False),
        (0.0030, 0.0029, True),  # near plain ORT
        (-0.0025, 0.0029, True),  # as far from what is exact as plain ORT is, on the other side
        (-0.0045, 0.0029, False),
        (-0.0200, 0.0200, False),  # no model may be a hundredth apart
        (float("nan"), 0.0029, False),
    ],
)
def test_rounding_allows_what_it_does_to_plain_ort(
    more: float, rounded: float, expected: bool
) -> None:
    assert is_within(more, runs(rounded)) == expected


def test_only_what_half_precision_reaches_may_differ_by_it() -> None:
    model = as_it_is(MODELS["chain"]())
    half = replace(model.tensors["y"], element_type=onnx.TensorProto.FLOAT16)
    aside = replace(model, tensors={**model.tensors, "elsewhere": half})
    session = cast(Session, FakeSession(0.015))
    plain = replace(runs(0.0), outputs_otherwise=lambda: ([EXACT],))
    assert not differences_from(aside, session, plain)[0].is_within
    reached = replace(model, tensors={**model.tensors, "x": half})
    assert differences_from(reached, session, plain)[0].is_within


@pytest.mark.parametrize(("flipped", "expected"), [(0, True), (1, True), (3, False)])
def test_half_precision_may_flip_a_few_integers(flipped: int, expected: bool) -> None:
    exact = np.arange(100)
    given = exact.copy()
    given[:flipped] += 1
    tolerances = Tolerances(relative_of={"y": 0.02})
    found = difference("y", given, exact, tolerances)
    assert (found.is_within, found.relative) == (expected, flipped / 100)
    assert difference("y", given, exact, Tolerances()).is_within == (flipped == 0)


def test_integers_that_differ_are_counted() -> None:
    model = replace(as_it_is(MODELS["chain"]()), precision="fp16")
    expected = ([(EXACT * 0).astype(np.int64)],)
    plain = PlainRuns(("y",), ({},), expected, lambda: expected)
    session = cast(Session, FakeSession(0.0, kind=np.int64))
    with pytest.raises(NumericsError, match=r"in 33\.3% of its elements, .*; leave --precision"):
        check_numerics(model, session, plain)


def test_floats_that_overflow_are_said_to_be_apart_and_not_counted() -> None:
    model = as_it_is(MODELS["chain"]())
    session = cast(Session, FakeSession(float("inf")))
    with pytest.raises(NumericsError, match=r"differs from plain ONNX Runtime by inf \(relative"):
        check_numerics(model, session, runs(0.0))


@pytest.mark.parametrize(("device", "otherwise"), [(CPU, "one thread"), (GPU, "no TF32")])
def test_plain_ort_runs_three_inputs_and_otherwise_only_when_asked(
    device: Device, otherwise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[SessionSettings] = []

    def open_session(source: Any, settings: SessionSettings) -> OrtSession:
        opened.append(settings)
        return OrtSession(source, replace(settings, device=CPU))

    monkeypatch.setattr(checking, "OrtSession", open_session)
    plain = run_plain(as_it_is(MODELS["chain"]()), device, 0, ())
    assert len({feed["x"].tobytes() for feed in plain.feeds}) == len(plain.outputs) == 3
    assert len(opened) == 1
    for _ in range(2):
        assert len(plain.outputs_otherwise()) == 3
    usual, other = opened
    assert usual.device == other.device == device
    differs = {
        "one thread": other.thread_count == 1 != usual.thread_count,
        "no TF32": usual.variant.tf32 and not other.variant.tf32,
    }
    assert [name for name, is_so in differs.items() if is_so] == [otherwise]


def test_other_rounding_is_only_computed_where_it_is_needed() -> None:
    def never() -> Any:
        raise AssertionError("computed")

    assert is_within(0.0, replace(runs(0.0), outputs_otherwise=never))


def test_what_is_further_apart_is_refused() -> None:
    model: Model = as_it_is(MODELS["chain"]())
    with pytest.raises(NumericsError, match=r"'y' differs from plain ONNX Runtime by 0\.02"):
        check_numerics(model, cast(Session, FakeSession(0.02)), runs(0.0))


def test_what_plain_ort_does_not_open_is_not_written() -> None:
    model: Model = as_it_is(MODELS["chain"]())
    check_portable(model, CPU, ())
    model.proto.graph.node[-1].output[0] = model.proto.graph.node[0].output[0]
    with pytest.raises(ModelError, match=r"can't be opened \(ONNX Runtime .*\), so nothing was w"):
        check_portable(model, CPU, ())
