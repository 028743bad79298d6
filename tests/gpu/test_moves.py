"""Numbers that are moved without a session arrive, and bands of rows lie where the image does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.execution import lowered_source, open_executor, plan_lowered
from onnxsched_runtime.executors.streams import Capture
from onnxsched_runtime.moves import Cut, Joined, Move, Reordered, left_in_place
from onnxsched_runtime.moving import moved_nodes
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart
from onnxsched_runtime.tensor import TensorType
from support import models
from support.fused import FUSES
from support.optimizing import assert_close

_CUDA = Device("cuda")
CAPTURES: tuple[Capture, ...] = ("whole", "ort", "none")
_RNG = np.random.default_rng(0)


def _launched(
    make: Callable[[Any, int, int, Device], cuda.Launch],
    move: Cut | Reordered,
    image: np.ndarray,
    nbytes: int,
) -> bytes:
    """What a move leaves in memory, launched by a graph."""
    kind = TensorType(TensorProto.UINT8, (nbytes,))
    with (
        cuda.DeviceMemory(image.nbytes, _CUDA) as source,
        cuda.DeviceMemory(nbytes, _CUDA) as target,
        cuda.Stream(_CUDA) as stream,
    ):
        source.upload(image, 0)
        launch = make(move, source.pointer, target.pointer, _CUDA)
        launch(stream)
        stream.synchronize()
        cuda.Buffer(kind, _CUDA, target.pointer).fill(np.zeros(nbytes, np.uint8), stream)
        graph = cuda.Graph.capture(stream, lambda: launch(stream))
        graph.launch(stream)
        buffer = cuda.Buffer(kind, _CUDA, target.pointer)
        buffer.fetch(stream)
        stream.synchronize()
        graph.close()
        return buffer.staging.tobytes()


@pytest.mark.parametrize(("start", "nbytes"), [(0, 4096), (16, 100), (3, 7), (1024, 1 << 20)])
def test_a_piece_is_copied(start: int, nbytes: int) -> None:
    image = _RNG.integers(0, 256, start + nbytes + 5, np.uint8)
    found = _launched(cuda.cutting, Cut("a", "b", start, nbytes, image.nbytes), image, nbytes)
    assert found == image[start : start + nbytes].tobytes()


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, np.uint8])
@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((2, 3, 20, 31), [0, 2, 3, 1]),
        ((1, 7, 5, 4), [3, 2, 1, 0]),
        ((1, 3, 4, 2, 6, 2), [0, 2, 4, 3, 5, 1]),
    ],
)
def test_numbers_are_put_in_another_order(
    kind: type, shape: tuple[int, ...], perm: list[int]
) -> None:
    image: np.ndarray = _RNG.integers(0, 100, shape).astype(kind)
    steps = [step // image.itemsize for step in image.strides]
    expected = image.transpose(perm)[:, 1:]
    strides = tuple(steps[axis] for axis in perm)
    move = Reordered("a", "b", expected.shape, image.itemsize, strides[1], strides)
    found = _launched(cuda.reordering, move, image, expected.nbytes)
    assert found == np.ascontiguousarray(expected).tobytes()


def banded() -> onnx.ModelProto:
    """Convolutions over two bands of rows, whose halos are cut off and which are joined."""
    return _model(
        """(float[1, 3, 40, 32] x) => (float[1, 16, 40, 32] y) {
            upper = Slice(x, zero, high, rows)
            lower = Slice(x, low, far, rows)
            a = Conv<pads = [1, 1, 1, 1]>(upper, first, bias)
            b = Conv<pads = [1, 1, 1, 1]>(lower, first, bias)
            c = Relu(a)
            d = Relu(b)
            e = Slice(c, zero, half, rows)
            f = Slice(d, one, far, rows)
            whole = Concat<axis = 2>(e, f)
            y = Conv<pads = [1, 1, 1, 1]>(whole, second, bias)
        }"""
    )


def halved() -> onnx.ModelProto:
    """A convolution whose halves convolutions read where they are."""
    return _model(
        """(float[1, 3, 40, 32] x) => (float[1, 16, 20, 32] y, float[1, 16, 20, 32] z) {
            a = Conv<pads = [1, 1, 1, 1]>(x, first, bias)
            b = Relu(a)
            upper = Slice(b, zero, half, rows)
            lower = Slice(b, half, far, rows)
            y = Conv<pads = [1, 1, 1, 1]>(upper, second, bias)
            z = Conv<pads = [1, 1, 1, 1]>(lower, second, bias)
        }"""
    )


def _model(text: str) -> onnx.ModelProto:
    numbers = {"zero": 0, "one": 2, "half": 20, "high": 22, "low": 18, "far": 99, "rows": 2}
    return models.model_of(
        text,
        **{name: np.array([value], np.int64) for name, value in numbers.items()},
        first=_RNG.standard_normal((16, 3, 3, 3), np.float32),
        second=_RNG.standard_normal((16, 16, 3, 3), np.float32),
        bias=_RNG.standard_normal(16, np.float32),
    )


@pytest.mark.parametrize("device_count", [1, 2])
@pytest.mark.parametrize(
    ("build", "elsewhere", "kinds", "left_kind"),
    [
        (
            banded,
            {"Slice_1", "Conv_3", "Relu_5", "Slice_7"},
            {Reordered: 2, Cut: 2, Joined: 1},
            Joined,
        ),
        (halved, {"Conv_5"}, {Reordered: 1, Cut: 2}, Cut),
    ],
)
def test_bands_of_rows_lie_where_the_image_does(
    build: Callable[[], onnx.ModelProto],
    elsewhere: set[str],
    kinds: dict[type[Move], int],
    left_kind: type[Move],
    device_count: int,
) -> None:
    if cuda.device_count() < device_count:
        pytest.skip("needs a second GPU")
    model = build()
    annotation = models.annotation_of(model, (1,), device=_CUDA)
    second = Placement(Device("cuda", device_count - 1), 2)
    placements = {n: second if n in elsewhere else p for n, p in annotation.placements.items()}
    annotation = replace(annotation, placements=placements, variant=FUSES)
    source = lowered_source(model, annotation)
    moves = moved_nodes(source)
    assert Counter(type(move) for move in moves.values()) == kinds
    left = left_in_place(moves, source.ends)
    assert left == {name for name, move in moves.items() if isinstance(move, left_kind)}
    plan = plan_lowered(model, annotation, source)
    assert bool(plan.copies) == (device_count == 2)
    names = [value.name for value in model.graph.output]
    plain = ModelPart(model.SerializeToString(), {})
    with OrtSession(plain, SessionSettings(Device("cpu"))) as session:
        for capture in CAPTURES:
            with open_executor(source, plan, capture=capture) as executor:
                assert (executor.capture, executor.refusal) == (capture, None)
                for _ in range(3):
                    feeds = {"x": _RNG.standard_normal((1, 3, 40, 32), np.float32)}
                    found = executor.run(feeds, names)
                    assert_close(found, session.run(feeds, names), 5e-3)  # in TF32
