"""Measurements as values."""

from __future__ import annotations

import dataclasses
import json
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched.cost import OperatorCost
from onnxsched.profile import KernelProfile, Multiprocessor, OperatorProfile, Profile, Roofline

LIMITS = Multiprocessor(shared_memory_nbytes=100_000, registers=64_000, threads=2000, count=4)


def kernel(
    block: tuple[int, int, int] = (1, 1, 1),
    registers: int = 0,
    shared_memory: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
) -> KernelProfile:
    return KernelProfile("k", 1.0, grid, block, registers, shared_memory, 0.5)


@pytest.mark.parametrize(
    ("block", "registers", "shared_memory", "share"),
    [
        ((10, 5, 2), 0, 0, 0.05),
        ((10, 5, 2), 64, 0, 0.1),
        ((10, 5, 2), 64, 20_000, 0.2),
        ((1000, 1, 1), 16, 20_000, 0.5),
        ((1, 1, 1), 0, 400_000, 1.0),
    ],
    ids=["threads", "registers", "shared memory", "threads again", "at most all"],
)
def test_a_block_is_measured_by_the_resource_it_takes_most_of(
    block: tuple[int, int, int], registers: int, shared_memory: int, share: float
) -> None:
    assert kernel(block, registers, shared_memory).block_share(LIMITS) == share


@pytest.mark.parametrize("grid", [*permutations((2, 3, 4))])
def test_multiprocessors_get_a_block_each_whatever_shape_the_grid_has(
    grid: tuple[int, int, int],
) -> None:
    few, many = dataclasses.replace(LIMITS, count=20), dataclasses.replace(LIMITS, count=48)
    one = kernel((32, 1, 1), grid=grid)
    assert (one.sm_share(few), one.sm_share(many)) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("flop_count", "nbytes", "bound"),
    [(1000, 10, "compute"), (10, 1000, "memory"), (200, 20, "memory"), (0, 0, "memory")],
)
def test_work_is_bound_by_what_takes_longer(flop_count: int, nbytes: int, bound: str) -> None:
    assert Roofline(flops_per_us=10.0, bytes_per_us=1.0).bound(flop_count, nbytes) == bound


def test_an_operator_takes_its_median_sample() -> None:
    assert OperatorProfile((9.0, 1.0, 2.0)).duration_us == 2.0
    assert OperatorProfile(()).duration_us == 0.0


def test_the_cost_has_the_largest_block_and_the_mean_share_of_all_kernels() -> None:
    kernels = (kernel((200, 1, 1)), kernel((500, 1, 1)), kernel((100, 1, 1), grid=(2, 2, 2)))
    operators = {"conv": OperatorProfile((3.0,), kernels), "host": OperatorProfile(())}
    bounds: Any = {"conv": "compute", "host": "memory"}
    profile = Profile(operators, bounds, LIMITS, measured_count=1)
    assert profile.cost("conv") == OperatorCost(3.0, "compute", 0.25, sm_share=0.5)
    assert profile.cost("host") == OperatorCost(0.0, "memory", 0.0, is_view=True)
    on_cpu = dataclasses.replace(profile, multiprocessor=None)
    assert on_cpu.cost("conv") == OperatorCost(3.0, "compute")
    assert on_cpu.cost("host") == OperatorCost(0.0, "memory")


threes = st.tuples(*[st.integers(1, 99)] * 3)
kernels = st.builds(
    KernelProfile, st.text(), st.floats(0.1, 9), threes, threes, st.integers(0, 255),
    st.integers(0, 99), st.floats(0, 1),
)  # fmt: skip
profiles = st.builds(
    OperatorProfile,
    st.lists(st.floats(0.001, 1e6), max_size=5).map(tuple),
    st.lists(kernels, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(profiles)
def test_measurements_survive_json(profile: OperatorProfile) -> None:
    content = json.loads(json.dumps(dataclasses.asdict(profile)))
    assert OperatorProfile.from_json(content) == profile


@pytest.mark.parametrize(
    "change",
    [
        {"samples_us": [0.0]},
        {"samples_us": [-1.0]},
        {"samples_us": [float("nan")]},
        {"samples_us": ["fast"]},
        {"samples_us": None},
        {"kernels": [{}]},
        {"kernels": [3]},
    ],
)
def test_what_is_no_measurement_is_refused(change: dict[str, Any]) -> None:
    content = dataclasses.asdict(OperatorProfile((1.0,), (kernel(),))) | change
    with pytest.raises((KeyError, TypeError, ValueError)):
        OperatorProfile.from_json(content)
