"""What ONNX Runtime makes of a model, and how often it is asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxsched
from onnxsched import optimizing
from onnxsched_runtime.settings import SessionSettings
from sample_models import build
from support.models import feeds_for, reference, weight
from support.optimizing import assert_close, loaded, parsed, plain_outputs, saved

EXPANDED = {
    "GroupNormalization": """(float[1,4,3,3] x) => (float[1,4,3,3] y) {
        y = GroupNormalization<num_groups = 2>(x, scale, shift)
    }""",
    "CenterCropPad": """(float[1,4,8,2] x) => (float[1,4,4,4] y) {
        y = CenterCropPad<axes = [2,3]>(x, size)
    }""",
    "SoftmaxCrossEntropyLoss": """(float[3,5] x, int64[3] t) => (float y) {
        y = SoftmaxCrossEntropyLoss(x, t)
    }""",
}
"""Operators that ONNX Runtime has no kernel for."""


def expanded(name: str) -> onnx.ModelProto:
    return parsed(
        EXPANDED[name], opset=21, scale=weight(4), shift=weight(4), size=np.array([4, 4])
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """Every model that ONNX Runtime is asked to optimize."""
    given: list[onnx.ModelProto] = []
    once = optimizing._optimized_once

    def noting(model: onnx.ModelProto, settings: SessionSettings) -> Any:
        given.append(model)
        return once(model, settings)

    monkeypatch.setattr(optimizing, "_optimized_once", noting)
    return given


@pytest.mark.parametrize("name", EXPANDED)
def test_what_an_operator_consists_of_is_folded(name: str, tmp_path: Path) -> None:
    model = expanded(name)
    found = loaded(model, tmp_path)
    assert not {"Shape", name} & {node.op_type for node in found.proto.graph.node}
    assert found.host_reasons == {}
    feeds = feeds_for(model)
    assert_close(reference(found.proto, feeds), plain_outputs(tmp_path / "in.onnx", feeds))


def test_a_group_norm_is_optimized(tmp_path: Path) -> None:
    source = saved(expanded("GroupNormalization"), tmp_path)
    result = onnxsched.optimize(
        source, tmp_path / "out.onnx", device="cpu", cache_dir=None, budget_s=0
    )
    assert result.host_reasons == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("(float[3] x) => (float[3] y) { y = Relu(x) }", 1),
        ("(float[3] x) => (float[3] y) { y = Swish(x) }", 2),
        ("(float[n] x) => (float[k,1] y) { a = NonZero(x) b = Shape(a) y = Expand(x, b) }", 1),
        ("(float[3] x) => (float[3] y) { a = DequantizeLinear(q, s) y = Add(a, x) }", 1),
    ],
)
def test_onnx_runtime_is_asked_again_only_where_something_is_left_to_fold(
    text: str, count: int, tmp_path: Path, asked: list[onnx.ModelProto]
) -> None:
    model = parsed(text, opset=24, q=np.arange(3, dtype=np.int8), s=np.array(0.5, np.float32))
    loaded(model, tmp_path, {"x": (3,)})
    assert len(asked) == count


def test_what_is_never_folded_ends(
    tmp_path: Path, asked: list[onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizing, "_is_half_folded", lambda model: True)
    loaded(build("tiny"), tmp_path)
    assert len(asked) == 2
