"""Ctrl-C asks once and stops at the second time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from onnxsched.interruption import Interruption


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def handler() -> Iterator[list[int]]:
    """Every SIGINT that got through to whoever handled it before."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGINT, before)


def test_the_first_is_a_request_and_the_second_an_interrupt(handler: list[int]) -> None:
    with Interruption() as interruption:
        assert not interruption.is_requested
        press_ctrl_c()
        assert interruption.is_requested
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert handler == []


@pytest.mark.parametrize("presses", [0, 1])
def test_the_handler_before_is_back_afterwards(handler: list[int], presses: int) -> None:
    with Interruption() as interruption:
        for _ in range(presses):
            press_ctrl_c()
    assert interruption.is_requested == bool(presses)
    assert handler == []
    press_ctrl_c()
    assert handler == [signal.SIGINT]


def test_it_is_back_after_an_error_too(handler: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), Interruption():
        raise ZeroDivisionError
    press_ctrl_c()
    assert handler == [signal.SIGINT]


def test_one_within_another_takes_the_request(handler: list[int]) -> None:
    with Interruption() as outer:
        with Interruption() as inner:
            press_ctrl_c()
        assert (outer.is_requested, inner.is_requested) == (False, True)
        press_ctrl_c()
        assert outer.is_requested
    assert handler == []


def test_off_the_main_thread_nothing_changes(handler: list[int]) -> None:
    found = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            found.append(signal.getsignal(signal.SIGINT) is before)
        found.append(interruption.is_requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, False]
    press_ctrl_c()
    assert handler == [signal.SIGINT]
