"""The fastest kernel of a convolution is found without trying what can't be, on fakes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from onnxsched_runtime.cuda import fused_kernels, racing
from onnxsched_runtime.cuda.operations import Places
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.kernels import PLAIN, Computed, FusedConvolution, Kernel, Pool
from support.fake_cuda import FakeGraph, FakeMemory, FakeStream

GPU = Device("cuda")
DENSE = FusedConvolution(
    TensorProto.FLOAT, (1, 6, 5, 4), (3, 6, 1, 1), (1, 3, 5, 4), (1, 1), (1, 1), (0,) * 4,
    has_bias=True, adds=True, is_rectified=False,
)  # fmt: skip
GROUPED = replace(DENSE, filters=(6, 1, 1, 1), output=(1, 6, 5, 4))
POOL = Pool(
    TensorProto.FLOAT, (1, 6, 5, 4), (1, 3, 5, 4), (3, 3), (1, 1), (1,) * 4,
    averages=True, counts_padding=False,
)  # fmt: skip
Race = Callable[[Computed, list[float | None]], Kernel | None]


@dataclass(frozen=True)
class Built:
    what: Computed
    kernel: Kernel
    device: Device
    workspace_nbytes: int = 32

    def __post_init__(self) -> None:
        if self.kernel == ((-1,),):
            raise OnnxschedError("cuDNN reports NOT_SUPPORTED.")


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Iterator[Race]:
    """Finds the fastest of kernels with these times; None is one that cuDNN does not support."""

    def raced(what: Computed, times: list[float | None]) -> Kernel | None:
        kernels = [((-1,),) if us is None else ((n,),) for n, us in enumerate(times)]
        monkeypatch.setattr(racing, "propose_kernels", lambda what, device: kernels)
        monkeypatch.setattr(racing, "build_kernel", Built)
        monkeypatch.setattr(racing, "DeviceMemory", FakeMemory)
        monkeypatch.setattr(racing, "_time_us", lambda built, *_: times[built.kernel[0][0]])
        monkeypatch.setattr(fused_kernels, "_kept", {})
        racing.fastest_kernel.cache_clear()
        found = racing.fastest_kernel(what, GPU)
        if found is not None:
            kept = fused_kernels.fused_kernel(what, GPU, found)
            assert isinstance(kept, Built), "what was built for the race is not built again"
        return found

    yield raced
    racing.fastest_kernel.cache_clear()


@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ([9.0, 5.0, 7.0], 1),
        ([None, 5.0, None, 4.0], 3),
        ([5.0, 4.9], 0),
        ([9.0] * racing._TRIED_COUNT + [1.0], 0),
        ([None, 9.0] + [9.0] * (racing._TRIED_COUNT - 2) + [1.0], racing._TRIED_COUNT),
    ],
)
def test_the_fastest_of_the_first_that_are_supported_is_found(
    times: list[float | None], fastest: int, race: Race
) -> None:
    assert race(DENSE, times) == ((fastest,),)


def test_of_grouped_convolutions_the_first_that_is_supported_is_taken(race: Race) -> None:
    assert race(GROUPED, [None, 5.0, 1.0]) == ((1,),)


def test_of_pools_the_plain_one_is_left_for_what_is_clearly_faster(race: Race) -> None:
    assert race(POOL, [5.0, 4.9, 3.0]) == ((2,),)
    assert race(POOL, [5.0, 4.9]) == ((0,),)


def test_the_plain_kernel_of_a_pool_is_proposed_first_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OnnxschedError("cuDNN reports NOT_SUPPORTED.")

    monkeypatch.setattr(fused_kernels, "_proposed", refuse)
    monkeypatch.setattr(fused_kernels, "current_device", lambda device: nullcontext())
    fused_kernels.propose_kernels.cache_clear()
    assert fused_kernels.propose_kernels(POOL, GPU) == (PLAIN,)
    assert fused_kernels.propose_kernels(DENSE, GPU) == ()
    fused_kernels.propose_kernels.cache_clear()


def test_there_may_be_none(race: Race) -> None:
    assert race(DENSE, [None, None]) is None
    assert race(DENSE, []) is None


def test_where_there_is_no_room_to_try_any_none_is_chosen(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert race(DENSE, [5.0]) == ((0,),)

    def refuse(nbytes: int, device: Device) -> None:
        raise OnnxschedError("out of memory")

    monkeypatch.setattr(racing, "DeviceMemory", refuse)
    racing.fastest_kernel.cache_clear()
    assert racing.fastest_kernel(DENSE, GPU) is None


@pytest.mark.parametrize("what", [DENSE, replace(DENSE, has_bias=False, adds=False), POOL])
@pytest.mark.parametrize("drawn_count", [1 << 20, 7])
def test_kernels_are_timed_on_numbers_in_memory_of_their_own(
    what: Computed, drawn_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[FakeMemory] = []

    class Memory(FakeMemory):
        def __init__(self, nbytes: int, device: Device) -> None:
            super().__init__(nbytes, device)
            memories.append(self)

    monkeypatch.setattr(racing, "DeviceMemory", Memory)
    monkeypatch.setattr(racing, "_DRAWN_COUNT", drawn_count)
    racing._drawn.cache_clear()
    with racing._tensors(what, GPU) as places:
        sizes = {
            places.image: 480, places.output: 240,
            **({} if places.filters is None else {places.filters: 72}),
            **({} if places.bias is None else {places.bias: 12}),
            **({} if places.added is None else {places.added: 240}),
        }  # fmt: skip
        there = [getattr(places, name) is not None for name in ("filters", "bias", "added")]
        if isinstance(what, FusedConvolution):
            assert there == [True, what.has_bias, what.adds]
        else:
            assert there == [False] * 3
        ends = sorted(sizes)
        assert all(a + sizes[a] <= b for a, b in pairwise(ends))
        assert all((start - memories[0].pointer) % 16 == 0 for start in ends)
        assert ends[0] == memories[0].pointer
        assert ends[-1] + sizes[ends[-1]] <= memories[0].pointer + memories[0].nbytes
        for start in filter(None, (places.image, places.filters)):
            held = np.frombuffer(ctypes.string_at(start, sizes[start]), np.float32)
            count = min(drawn_count, held.size)
            assert np.unique(held).size == count, "random numbers"
    assert [memory.pointer for memory in memories] == [0], "given back"
    racing._drawn.cache_clear()


def test_what_is_hopeless_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[Places] = []

    class Timed(Built):
        def bind(self, places: Places) -> Callable[[Any], None]:
            return lambda stream: bounds.append(places)

    counts: list[int] = []

    def timed(stream: Any, launch: Callable[[], None], count: int, **_: int) -> list[float]:
        launch()
        counts.append(count)
        return [50.0] * count

    monkeypatch.setattr(racing, "DeviceMemory", FakeMemory)
    monkeypatch.setattr(racing, "graph_stream", FakeStream)
    monkeypatch.setattr(racing, "Graph", FakeGraph)
    monkeypatch.setattr(racing, "time_launches_us", timed)
    kernel: Any = Timed(DENSE, ((1,),), GPU)
    repeat_count = racing._REPEAT_COUNT
    places = Places(1, 2, 3, None, None, 0)
    assert racing._time_us(kernel, places, math.inf) == 50.0 / repeat_count
    assert counts == [1, racing._SAMPLE_COUNT]
    assert len(bounds) == 1 + 2 * repeat_count
    (bound,) = set(bounds)
    assert bound.workspace
    assert replace(bound, workspace=0) == places
    assert racing._time_us(kernel, places, 1.0) == 50.0 / repeat_count
    assert counts[2:] == [1]
