"""Devices and placements print and parse as the annotation writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError


@given(device=st.builds(Device, st.sampled_from(["cpu", "cuda"]), st.integers(0, 99)))
def test_a_device_parses_from_what_it_prints(device: Device) -> None:
    assert Device.parse(str(device)) == device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu", 0)),
        ("cuda", Device("cuda", 0)),
        ("cuda:12", Device("cuda", 12)),
        (" cpu:1 ", Device("cpu", 1)),
    ],
)
def test_the_index_is_0_where_it_is_left_out(text: str, device: Device) -> None:
    assert Device.parse(text) == device


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1:2", "cuda:a"])
def test_what_is_no_device_is_a_usage_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Device.parse(text)
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"'{text}' is no device: write cpu, cuda or cuda:INDEX."


def test_placements_sort_by_device_then_stream() -> None:
    first, second, third = (
        Placement(Device("cpu", 1), 9),
        Placement(Device("cuda", 0), 1),
        Placement(Device("cuda", 0), 10),
    )
    assert sorted([third, second, first]) == [first, second, third]
    assert str(third) == "cuda:0/10"
