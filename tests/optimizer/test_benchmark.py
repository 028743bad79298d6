"""Which arms a schedule is measured beside."""

from __future__ import annotations

from typing import Any

import pytest

from onnxsched.arms import ARMS, arm_names, needed_by_ort_graph
from onnxsched.benchmark import _free_nbytes, bench
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from support.strategies import GPU


@pytest.mark.parametrize(
    ("rewrite", "has_original", "is_possible"),
    [("none", False, True), ("merge", True, True), ("merge", False, False)],
)
def test_onnx_runtimes_own_graph_needs_operators_that_it_can_capture(
    rewrite: str, has_original: bool, is_possible: bool
) -> None:
    needed = needed_by_ort_graph(
        Annotation({}, {}, {}, details={"rewrite": rewrite}), has_original
    )
    names = arm_names((), GPU, needed)
    left_out = {"schedule-ort"} if is_possible else {"schedule-ort", "ort-graph"}
    assert names == [name for name in ARMS if name not in left_out]
    assert "schedule-ort" in arm_names(("schedule-ort",), GPU, needed)
    if not is_possible:
        with pytest.raises(UsageError, match="'ort-graph' needs the model as it was before"):
            arm_names(("ort-graph",), GPU, needed)


def test_a_model_with_host_operators_is_not_captured_by_onnx_runtime() -> None:
    needed = needed_by_ort_graph(Annotation({}, {}, {"node": "a loop"}), True)
    with pytest.raises(UsageError, match="needs a model without host operators"):
        arm_names(("ort-graph",), GPU, needed)


def test_memory_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "free_memory_nbytes", lambda device: 100 + device.index)
    assert _free_nbytes((GPU, Device("cuda", 3))) == 203
    assert _free_nbytes((Device("cpu", 0), Device("cpu", 1))) is None


@pytest.mark.parametrize(
    "numbers",
    [{"iterations": 0}, {"duration_s": -1.0}, {"duration_s": float("nan")}, {"warmup_ms": -1.0}],
)
def test_what_would_measure_nothing_is_refused_first(numbers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least"):
        bench("missing.onnx", **numbers)
