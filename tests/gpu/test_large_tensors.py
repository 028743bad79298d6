"""Large tensors are copied in parts, some while others are on their way; empty ones not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import onnxsched
from onnxsched_runtime.device import Device
from support import models
from support.optimizing import saved

_SHAPES = ((7, 3, 401, 399), (5, 1 << 20), (2, 3))
"""Of the inputs: no multiple of a part, one that is, and a small one."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image, table, few = (",".join(map(str, shape)) for shape in _SHAPES)
    model = models.model_of(
        f"""(float[{image}] image, int64[{table}] table, float[{few}] few)
            => (float[{image}] p, int64[{table}] q, float[{few}] r) {{
            p = Neg(image)
            q = Neg(table)
            r = Neg(few)
        }}"""
    )
    made = models.annotated(model, (0, 1), device=Device("cuda", 0))
    return saved(made, tmp_path_factory.mktemp("large"))


def _feeds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image, table, few = _SHAPES
    return {
        "image": rng.standard_normal(image, dtype=np.float32),
        "table": rng.integers(1 << 60, size=table),
        "few": rng.standard_normal(few, dtype=np.float32),
    }


def test_each_run_reads_its_own_inputs_and_writes_its_own_outputs(path: Path) -> None:
    runs = [_feeds(seed) for seed in range(4)]
    with onnxsched.load(path) as session:
        found = [session.run(None, feeds) for feeds in runs * 5]
    for feeds, outputs in zip(runs * 5, found, strict=True):
        for given, output in zip(feeds.values(), outputs, strict=True):
            np.testing.assert_array_equal(output, -given)


def test_arrays_that_are_read_only_or_not_in_order_go_in(path: Path) -> None:
    feeds = _feeds(9)
    transposed = np.asfortranarray(feeds["image"])
    frozen = feeds["table"].copy()
    frozen.flags.writeable = False
    with onnxsched.load(path) as session:
        p, q = session.run(["p", "q"], {**feeds, "image": transposed, "table": frozen})
    np.testing.assert_array_equal(p, -feeds["image"])
    np.testing.assert_array_equal(q, -feeds["table"])


@pytest.mark.parametrize("capture", ["whole", "none"])
def test_tensors_may_have_no_numbers(tmp_path: Path, capture: Literal["whole", "none"]) -> None:
    model = models.model_of("(float[0,3] x) => (float[0,3] y) { a = Relu(x)  y = Neg(a) }")
    made = models.annotated(model, (0, 1), device=Device("cuda", 0))
    with onnxsched.load(saved(made, tmp_path), capture=capture) as session:
        assert session.refusal is None
        (y,) = session.run(None, {"x": np.empty((0, 3), np.float32)})
    assert y.shape == (0, 3)
