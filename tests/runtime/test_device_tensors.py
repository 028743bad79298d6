"""GPU tensors go to what the host reads, and come of what it writes, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.load import Session
from support import fake_cuda, models


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[fake_cuda.FakeGraph]:
    fake_cuda.take_tensors_for_gpus(monkeypatch)
    return fake_cuda.install(monkeypatch)


def opened(model: onnx.ModelProto, host_kind: str) -> Session:
    """A session that leaves operators of a kind to the host."""
    annotation = models.annotation_of(model, device=Device("cuda"))
    on_host = {node.name: "as asked" for node in model.graph.node if node.op_type == host_kind}
    return Session(model, replace(annotation, host_reasons=on_host))


def two_parts() -> onnx.ModelProto:
    return models.model_of(
        "(float[3] x, float[4] n) => (float[3] y, float[4] w) { y = Neg(x)  w = Exp(n) }"
    )


def test_strings_come_as_an_array_beside_tensors() -> None:
    model = models.model_of(
        "(float[3] x) => (float[3] y, string[3] s) { y = Neg(x)  s = Cast<to = 8>(x) }"
    )
    with opened(model, "Cast") as session:
        y, s = session.run(None, {"x": torch.ones(3)})
    assert isinstance(y, torch.Tensor)
    assert s.tolist() == ["1", "1", "1"]


def test_what_the_host_reads_may_need_a_gradient() -> None:
    with opened(two_parts(), "Exp") as session:
        x, n = (torch.ones(count, requires_grad=True) for count in (3, 4))
        y, w = session.run(None, {"x": x, "n": n})
    np.testing.assert_array_equal(y, -np.ones(3))
    np.testing.assert_allclose(w, np.full(4, np.e), rtol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.ones(2), r"takes shape \[4\], got \[2\]"),
        (torch.ones(4, 1), r"takes shape \[4\], got \[4, 1\]"),
        (torch.ones(4, dtype=torch.int32), r"takes float32, got int32"),
        (torch.ones(4, dtype=torch.bfloat16), r"can't be read"),
    ],
)
def test_what_the_host_reads_has_to_fit(tensor: Any, sentence: str) -> None:
    with (
        opened(two_parts(), "Exp") as session,
        pytest.raises(UsageError, match=f"Input 'n' {sentence}"),
    ):
        session.run(None, {"x": torch.ones(3), "n": tensor})


def test_numbers_that_torch_has_only_marked_as_negated_are_negated() -> None:
    marked = torch.ones(1, dtype=torch.complex64).mul(2j).conj().imag
    assert marked.is_neg()
    assert marked.is_contiguous()
    with opened(models.model_of("(float[1] x) => (float[1] y) { y = Neg(x) }"), "") as session:
        (y,) = session.run(None, {"x": marked})
    assert y.tolist() == [2.0]
