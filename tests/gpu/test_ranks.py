"""Two processes with a GPU each, over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxsched_runtime import cuda
from support.models import MODELS, host_reasons
from support.ranks import run_ranks


@pytest.mark.skipif(cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_compute_every_model_that_can_be_captured(tmp_path: Path) -> None:
    ended = run_ranks(2, "models", "cuda", "99", folder=tmp_path, limit_s=250.0)
    assert [process.code for process in ended] == [0, 0], ended
    done = [text.partition(":")[0] for text in ended[0].stdout.split()]
    assert done == [name for name, build in MODELS.items() if not host_reasons(build())]
