"""The fastest kernel of a convolution is found without trying what can't be, on fakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from onnx import TensorProto

from onnxsched_runtime.convolution import FusedConvolution, Kernel
from onnxsched_runtime.cuda import convolutions, racing
from onnxsched_runtime.cuda.convolutions import Places
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from support.fake_cuda import FakeGraph, FakeMemory, FakeStream

GPU = Device("cuda")
DENSE = FusedConvolution(
    TensorProto.FLOAT, (1, 6, 5, 4), (3, 6, 1, 1), (1, 3, 5, 4), (1, 1), (1, 1), (0,) * 4,
    has_bias=True, adds=True, is_rectified=False,
)  # fmt: skip
GROUPED = replace(DENSE, filters=(6, 1, 1, 1), output=(1, 6, 5, 4))
Race = Callable[[FusedConvolution, list[float | None]], Kernel | None]


@dataclass(frozen=True)
class Built:
    what: FusedConvolution
    kernel: Kernel
    device: Device
    workspace_nbytes: int = 32

    def __post_init__(self) -> None:
        if self.kernel == ((-1,),):
            raise OnnxschedError("cuDNN reports NOT_SUPPORTED.")


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Iterator[Race]:
    """Finds the fastest of kernels with these times; None is one that cuDNN does not support."""

    def raced(what: FusedConvolution, times: list[float | None]) -> Kernel | None:
        kernels = [((-1,),) if us is None else ((n,),) for n, us in enumerate(times)]
        monkeypatch.setattr(racing, "propose_kernels", lambda what, device: kernels)
        monkeypatch.setattr(racing, "FusedKernel", Built)
        monkeypatch.setattr(racing, "_time_us", lambda what, built, *_: times[built.kernel[0][0]])
        monkeypatch.setattr(convolutions, "_kept", {})
        racing.fastest_kernel.cache_clear()
        found = racing.fastest_kernel(what, GPU)
        if found is not None:
            kept = convolutions.fused_kernel(what, GPU, found)
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


def test_there_may_be_none(race: Race) -> None:
    assert race(DENSE, [None, None]) is None
    assert race(DENSE, []) is None


@pytest.mark.parametrize("what", [DENSE, replace(DENSE, has_bias=False, adds=False)])
def test_a_kernel_is_timed_on_memory_of_its_own(
    what: FusedConvolution, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[Memory] = []

    class Memory(FakeMemory):
        def __init__(self, nbytes: int, device: Device) -> None:
            super().__init__(nbytes, device)
            self.start = self.pointer
            memories.append(self)

    class Timed(Built):
        def bind(self, places: Places) -> Places:
            return places

        def launch(self, bound: Places, stream: Any) -> None:
            bounds.append(bound)

    bounds: list[Places] = []
    monkeypatch.setattr(racing, "DeviceMemory", Memory)
    monkeypatch.setattr(racing, "graph_stream", FakeStream)
    monkeypatch.setattr(racing, "Graph", FakeGraph)
    counts: list[int] = []

    def timed(stream: Any, launch: Callable[[], None], count: int, **_: int) -> list[float]:
        launch()
        counts.append(count)
        return [50.0] * count

    monkeypatch.setattr(racing, "time_launches_us", timed)
    kernel: Any = Timed(what, ((1,),), GPU)
    repeat_count = racing._REPEAT_COUNT
    assert racing._time_us(what, kernel, GPU, math.inf) == 50.0 / repeat_count
    assert counts == [1, racing._SAMPLE_COUNT]
    assert len(bounds) == 1 + 2 * repeat_count
    assert racing._time_us(what, kernel, GPU, 1.0) == 50.0 / repeat_count
    assert counts[2:] == [1], "what is hopeless is not timed again"
    (places,) = set(bounds[: 1 + 2 * repeat_count])
    sizes = {
        places.image: 480, places.filters: 72, places.output: 240, places.workspace: 32,
        **({} if places.bias is None else {places.bias: 12}),
        **({} if places.added is None else {places.added: 240}),
    }  # fmt: skip
    assert (places.bias is None, places.added is None) == (not what.has_bias, not what.adds)
    ends = sorted(sizes)
    assert all(a + sizes[a] <= b for a, b in pairwise(ends))
    assert all((start - memories[0].start) % 16 == 0 for start in ends)
    assert ends[0] == memories[0].start
    assert ends[-1] + sizes[ends[-1]] <= memories[0].start + memories[0].nbytes
