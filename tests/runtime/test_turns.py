"""Other contexts are made once a GPU, take turns while they are there, and are destroyed."""

from __future__ import annotations

from typing import Self

import pytest

from onnxsched_runtime import cuda
from onnxsched_runtime.cuda import turns
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError

CPU, FIRST, SECOND = Device("cpu"), Device("cuda", 0), Device("cuda", 1)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to contexts; there is no memory for one on `cuda:1`."""
    noted: list[str] = []

    class Context:
        def __init__(self, device: Device) -> None:
            noted.append(f"make {device}")
            if device == SECOND:
                raise OnnxschedError("There is no memory.")
            self.device = device

        def take_turn(self) -> None:
            noted.append(f"turn {self.device}")

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            noted.append(f"destroy {self.device}")

    monkeypatch.setattr(turns, "OtherContext", Context)
    return noted


def test_inside_another_only_further_gpus_get_one(events: list[str]) -> None:
    with cuda.other_contexts([CPU, FIRST, SECOND]):
        cuda.forget_idle_streams()
        with cuda.other_contexts([FIRST]):
            cuda.forget_idle_streams()
        cuda.forget_idle_streams()
    cuda.forget_idle_streams()
    turn = "turn cuda:0"
    assert events == ["make cuda:0", "make cuda:1", turn, turn, turn, "destroy cuda:0"]


def test_they_are_gone_after_an_error(events: list[str]) -> None:
    with pytest.raises(ValueError, match="lost"), cuda.other_contexts([FIRST]):
        raise ValueError("lost")
    cuda.forget_idle_streams()
    assert events == ["make cuda:0", "destroy cuda:0"]
