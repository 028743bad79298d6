"""Captured runs that outlive their sessions: which do, and that nothing they need is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.load import Session
from onnxsched_runtime.session import OrtSession
from support import models
from support.optimizing import assert_close

_CUDA = Device("cuda")


def towers(count: int) -> onnx.ModelProto:
    """Chains of operators without products, side by side, and their sum."""
    chains = "\n".join(
        f"""a{n} = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(x)
            b{n} = Mul(a{n}, scale)
            c{n} = Relu(b{n})
            l{n}, r{n} = Split<axis = 1>(c{n}, halves)
            d{n} = Concat<axis = 1>(r{n}, l{n})
            e{n} = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>(d{n})
            f{n} = Sub(e{n}, b{n})"""
        for n in range(count)
    )
    total = ", ".join(f"f{n}" for n in range(count))
    return models.model_of(
        f"(float[1,8,32,32] x) => (float[1,8,32,32] y) {{ {chains}\n y = Sum({total}) }}",
        scale=models.weight(8, 1, 1),
        halves=np.array([4, 4]),
    )


@contextmanager
def opened(model: onnx.ModelProto, streams: tuple[int, ...]) -> Iterator[Session]:
    with Session(model, models.annotation_of(model, streams, device=_CUDA)) as session:
        assert (session.capture, session.refusal) == ("whole", None)
        yield session


def in_towers(model: onnx.ModelProto, count: int) -> dict[str, Placement]:
    """Each chain on a stream of its own."""
    per_chain = (len(model.graph.node) - 1) // count
    return {
        node.name: Placement(_CUDA, min(number // per_chain, count - 1))
        for number, node in enumerate(model.graph.node)
    }


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[OrtSession]:
    """The sessions that are open on the GPU."""
    found: list[OrtSession] = []
    make, close = OrtSession.__init__, OrtSession.close

    def made(session: OrtSession, *arguments: Any) -> None:
        make(session, *arguments)
        found.append(session)

    def closed(session: OrtSession) -> None:
        close(session)
        found[:] = [other for other in found if other is not session]

    monkeypatch.setattr(OrtSession, "__init__", made)
    monkeypatch.setattr(OrtSession, "close", closed)
    return found


def test_sessions_end_and_nothing_that_their_runs_need_is_gone(live: list[OrtSession]) -> None:
    model = towers(6)
    annotation = models.annotation_of(model, (0,), device=_CUDA)
    annotation = replace(annotation, placements=in_towers(model, 6))
    with Session(model, annotation) as session:
        assert (session.capture, session.refusal) == ("whole", None)
        executor = session.executor
        assert isinstance(executor, StreamExecutor)
        runner = executor._runner
        assert isinstance(runner, LaneRunner)
        assert len(runner._session_lanes) == 6
        assert all(lane.outlives for lane in runner._session_lanes)
        assert len(live) <= 1, "at most the one that joins six may keep an address in its memory"
        overwrite_free_memory()
        for seed in range(20):
            feeds = models.feeds_for(model, seed)
            expected = models.reference(model, feeds)
            assert_close(session.run(None, feeds), expected)
            tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
            (output,) = executor.run_on_device(tensors, ["y"])
            assert_close([output.cpu().numpy()], expected)
    assert not live


def overwrite_free_memory() -> None:
    """Write over what sessions have just given back, which whoever still reads it would notice."""
    sizes = [size << 20 for size in (64, 16, 16, 8, 8, *[2] * 64)] + [1 << 16] * 512
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = MatMul(x, w)", {"w": (16, 16)}),
        ("a = Relu(x)\n b = MatMul(a, w)\n y = Add(a, b)", {"w": (16, 16)}),
    ],
)
def test_a_session_that_multiplies_matrices_stays(
    live: list[OrtSession], body: str, weights: dict[str, tuple[int, ...]]
) -> None:
    arrays = {name: models.weight(*shape) for name, shape in weights.items()}
    model = models.model_of(f"(float[4,16] x) => (float[4,16] y) {{ {body} }}", **arrays)
    with opened(model, (0,)) as session:
        assert len(live) == 1
        feeds = models.feeds_for(model)
        assert_close(session.run(None, feeds), models.reference(model, feeds), 1e-2)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = ReduceSum<keepdims = 1>(x, axis)", (8, 1)),
        ("a = Softmax(x)\n y = Transpose<perm = [1, 0]>(a)", (64, 8)),
        ("a, b = Split(x, uneven)\n c = Concat<axis = 0>(b, a, b)\n y = Gather(c, rows)", (3, 64)),
        ("a = Clip(x, low)\n b = Where(mask, a, x)\n y = Pad(b, pads)", (8, 67)),
        ("a = LayerNormalization(x, scale)\n b = Erf(a)\n y = Reshape(b, flat)", (4, 128)),
        ("k, i = TopK(x, one)\n y = Neg(k)", (8, 1)),
    ],
)
def test_whatever_ends_its_session_computes_the_same(body: str, shape: tuple[int, int]) -> None:
    weights = {
        "axis": np.array([1]),
        "uneven": np.array([3, 5]),
        "rows": np.array([7, 0, 3]),
        "low": models.weight(1)[0],
        "mask": models.weight(8, 1) > 0,
        "pads": np.array([0, 1, 0, 2]),
        "scale": models.weight(64),
        "flat": np.array([4, -1]),
        "one": np.array([1]),
    }
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    model = models.model_of(f"(float[8,64] x) => (float{list(shape)} y) {{ {body} }}", **used)
    with opened(model, (0,)) as session:
        overwrite_free_memory()
        for seed in range(5):
            feeds = models.feeds_for(model, seed)
            assert_close(session.run(None, feeds), models.reference(model, feeds))
