"""Convolutions launched through cuDNN compute what plain ONNX Runtime does, in one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod, sqrt

import numpy as np
import onnx
import pytest

from onnxsched.inputs import random_inputs
from onnxsched.loading import Model, load_model
from onnxsched.variants import lowered_model
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.cuda.fused_kernels import propose_kernels
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.fused import fused_nodes
from onnxsched_runtime.kernels import FusedConvolution, Kernel, Kernels, Pool
from onnxsched_runtime.load import Session
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.variant import Variant
from support import models
from support.fused import FUSES
from support.models import Array
from support.optimizing import saved

_CUDA = Device("cuda")
_UNKNOWN: Kernel = ((999_999,), (1, 2))
_NEAR = {"keep": 1e-3, "fp16": 1e-2}
"""Of the largest output; plain ONNX Runtime computes in float32 without TF32."""


def _weight(*shape: int) -> Array:
    """A weight that keeps numbers about as large as they are."""
    return (models.weight(*shape) / sqrt(prod(shape[1:]))).astype(np.float32)


def _inception() -> onnx.ModelProto:
    """A stem, branches side by side that are joined, a sum, and a last layer."""
    return models.model_of(
        """(float[1,8,32,32] x) => (float[1,16] y) {
            s0 = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w_stem, b_stem)
            s1 = Relu(s0)
            stem = MaxPool<kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]>(s1)
            a0 = Conv(stem, w_a)
            a = Relu(a0)
            b0 = Conv(stem, w_b, b_b)
            b1 = Relu(b0)
            b2 = Conv<pads = [1,1,1,1]>(b1, w_c)
            b = Relu(b2)
            c0 = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>(stem)
            c1 = Conv(c0, w_d, b_d)
            c = Relu(c1)
            joined = Concat<axis = 1>(a, b, c)
            d0 = Conv<pads = [1,1,1,1]>(joined, w_e, b_e)
            d1 = Add(d0, joined)
            d = Relu(d1)
            pooled = GlobalAveragePool(d)
            flat = Flatten(pooled)
            y = Gemm(flat, w_last)
        }""",
        w_stem=_weight(16, 8, 3, 3), b_stem=_weight(16), w_a=_weight(16, 16, 1, 1),
        w_b=_weight(8, 16, 1, 1), b_b=_weight(8), w_c=_weight(24, 8, 3, 3),
        w_d=_weight(24, 16, 1, 1), b_d=_weight(24), w_e=_weight(64, 64, 3, 3), b_e=_weight(64),
        w_last=_weight(64, 16),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["keep", "fp16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model in each precision."""
    path = saved(_inception(), tmp_path_factory.mktemp("fused"))
    return load_model(path, _CUDA, precision=request.param)


@pytest.fixture(scope="module")
def lowered(model: Model) -> Model:
    """The same with fused convolutions, and their fastest kernels."""
    return lowered_model(model, FUSES, _CUDA, ())


@contextmanager
def _opened(model: Model, kernels: Kernels, capture: Capture = "whole") -> Iterator[Session]:
    """The model on two streams."""
    names = [node.name for node in model.proto.graph.node]
    placements = {name: Placement(_CUDA, number % 2) for number, name in enumerate(names)}
    annotation = Annotation(placements, model.tensors, {}, FUSES, kernels)
    with Session(model.proto, annotation, capture=capture) as session:
        assert session.refusal is None
        assert session.capture == capture
        yield session


def _plain(model: Model) -> OrtSession:
    """Plain ONNX Runtime on the model as it was given."""
    source = ModelSource(model.baseline, model.tensors)
    return OrtSession(source.whole(), SessionSettings(_CUDA, variant=Variant(tf32=False)))


def _feeds(model: Model, seed: int) -> Mapping[str, Array]:
    return random_inputs(model.baseline, model.tensors, seed)


def _assert_near(session: Session, plain: OrtSession, model: Model, seeds: range) -> None:
    for seed in seeds:
        feeds = dict(_feeds(model, seed))
        (actual,), (expected,) = session.run(None, feeds), plain.run(feeds)
        near = _NEAR[model.precision] * np.abs(expected).max()
        assert np.abs(actual - expected).max() <= near, seed


def test_every_convolution_is_fused_and_rectifies_by_itself(lowered: Model) -> None:
    found = {node.what for node in fused_nodes(lowered.source).values()}
    convolutions = [what for what in found if isinstance(what, FusedConvolution)]
    assert len(convolutions) == 6
    assert all(what.is_rectified for what in convolutions)
    assert [what.adds for what in convolutions].count(True) == 1
    assert "Relu" not in {node.op_type for node in lowered.proto.graph.node}
    assert lowered.kernels.keys() == found


def test_every_pool_is_launched_by_us(lowered: Model) -> None:
    found = [node.what for node in fused_nodes(lowered.source).values()]
    pools = [what for what in found if isinstance(what, Pool)]
    assert [(pool.window, pool.averages) for pool in pools] == [((3, 3), False)] * 2


@pytest.mark.parametrize("capture", ["whole", "ort", "none"])
def test_however_it_is_captured_outputs_are_those_of_plain_ort(
    model: Model, lowered: Model, capture: Capture
) -> None:
    with _opened(model, lowered.kernels, capture) as session, _plain(model) as plain:
        _assert_near(session, plain, model, range(3))


def test_a_hundred_replays_of_one_graph_with_changing_inputs_stay_right(
    model: Model, lowered: Model
) -> None:
    with _opened(model, lowered.kernels) as session, _plain(model) as plain:
        assert isinstance(session.executor, StreamExecutor)
        assert session.executor.is_one_graph
        assert session.executor.graph_count == 1
        _assert_near(session, plain, model, range(100))


def test_the_fastest_kernel_can_be_asked_for(lowered: Model) -> None:
    for node in fused_nodes(lowered.source).values():
        fastest = cuda.fastest_kernel(node.what, _CUDA)
        assert fastest is not None
        assert fastest in propose_kernels(node.what, _CUDA)
        kernel = cuda.fused_kernel(node.what, _CUDA, fastest)
        assert kernel.device == _CUDA
        assert kernel.workspace_nbytes >= 0


def test_a_kernel_that_cudnn_does_not_know_gives_way_to_one_that_it_does(
    model: Model, lowered: Model
) -> None:
    unknown = dict.fromkeys(lowered.kernels, _UNKNOWN)
    with _opened(model, unknown) as session, _plain(model) as plain:
        _assert_near(session, plain, model, range(3))
    with _opened(model, {}) as session, _plain(model) as plain:
        _assert_near(session, plain, model, range(3))
