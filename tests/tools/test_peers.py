"""Plain ONNX Runtime in its fastest variant, chosen among those that are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from sample_models import build
from support.optimizing import loaded
from tools import peers
from tools.peers import open_arm

NHWC, BIAS, FUSED = Variant("nhwc"), Variant(fuse_conv_bias=True), Variant("nhwc", True)


class FakeArm:
    def __init__(self, variant: Variant, values: Sequence[float]) -> None:
        self.variant, self.values, self.is_open = variant, values, True

    def outputs(self) -> list[np.ndarray]:
        return [np.array(self.values, np.float32)]

    def close(self) -> None:
        self.is_open = False


@pytest.mark.parametrize(
    ("times_us", "fastest"),
    [
        ({DEFAULT_VARIANT: 10.0, NHWC: 9.0, BIAS: 1.0}, NHWC),
        ({DEFAULT_VARIANT: 10.0, NHWC: 11.0, BIAS: 1.0}, DEFAULT_VARIANT),
    ],
    ids=["another", "the default"],
)
def test_the_fastest_right_variant_is_the_arm(
    times_us: dict[Variant, float],
    fastest: Variant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[FakeArm] = []

    def plain(*arguments: Any) -> FakeArm:
        variant = arguments[-1]
        if variant == FUSED:
            raise ModelError("ONNX Runtime refuses the model.")
        made.append(FakeArm(variant, (1.0, 5.0) if variant == BIAS else (1.0, 2.0)))
        return made[-1]

    order = (DEFAULT_VARIANT, NHWC, BIAS, FUSED)
    monkeypatch.setattr(peers, "_plain_ort", plain)
    monkeypatch.setattr(peers, "possible_variants", lambda *_: order)
    monkeypatch.setattr(peers, "time_arm_us", lambda arm, count: (times_us[arm.variant],) * count)
    model = loaded(build("tiny"), tmp_path)
    monkeypatch.setattr(cuda, "require_device", lambda device: None)
    arm: Any = open_arm("ort-best", model, Device("cuda"), {})
    assert arm.variant == fastest
    assert {one.variant for one in made if one.is_open} == {fastest}
