"""Kernels of a trace written by hand are found in the range that launched them."""

from __future__ import annotations

from typing import Any

from onnxsched.profile import KernelProfile
from onnxsched.profiling.kernels import kernels_by_range

Event = dict[str, Any]
MAIN, WORKER = 1, 2


def named_range(name: str, start: float, end: float, thread: int = MAIN) -> Event:
    return {
        "ph": "X", "cat": "user_annotation", "name": name, "tid": thread,
        "ts": start, "dur": end - start, "args": {},
    }  # fmt: skip


def launch(time: float, correlation: int, thread: int = MAIN, api: str = "cuda_runtime") -> Event:
    return {
        "ph": "X", "cat": api, "name": "launch", "tid": thread,
        "ts": time, "dur": 1.0, "args": {"correlation": correlation},
    }  # fmt: skip


def kernel(name: str, start: float, correlation: int, cat: str = "kernel") -> Event:
    return {
        "ph": "X", "cat": cat, "name": name, "tid": 7, "ts": start, "dur": 2.5,
        "args": {
            "correlation": correlation, "grid": [8, 2, 1], "block": [128, 1, 1],
            "registers per thread": 40, "shared memory": 1024, "est. achieved occupancy %": 25,
        },
    }  # fmt: skip


def names(*events: Event) -> dict[str, list[str]]:
    found = kernels_by_range({"traceEvents": list(events)})
    return {name: [kernel.name for kernel in kernels] for name, kernels in found.items()}


def test_a_kernel_is_read_whole() -> None:
    trace = {"traceEvents": [named_range("a", 0, 10), launch(1, 5), kernel("k", 90, 5)]}
    assert kernels_by_range(trace) == {
        "a": (KernelProfile("k", 2.5, (8, 2, 1), (128, 1, 1), 40, 1024, 0.25),)
    }


def test_kernels_belong_to_the_range_of_their_launch_not_of_their_run() -> None:
    assert names(
        named_range("a", 0, 10),
        named_range("b", 10.5, 20),
        launch(9, 1),
        launch(11, 2),
        kernel("late", 15, 1),
        kernel("later", 30, 2),
    ) == {"a": ["late"], "b": ["later"]}


def test_correlations_and_events_may_be_in_any_order() -> None:
    assert names(
        kernel("third", 40, 3),
        launch(8, 3),
        kernel("first", 60, 9),
        launch(2, 9),
        launch(5, 1),
        kernel("second", 50, 1),
        named_range("a", 0, 10),
    ) == {"a": ["first", "second", "third"]}


def test_both_interfaces_launch_kernels() -> None:
    assert names(
        named_range("a", 0, 10),
        launch(1, 1),
        launch(2, 2, api="cuda_driver"),
        kernel("runtime", 20, 1),
        kernel("driver", 30, 2),
    ) == {"a": ["runtime", "driver"]}


def test_kernels_launched_outside_every_range_are_left_out() -> None:
    assert (
        names(
            launch(1, 1),
            named_range("a", 5, 10),
            launch(12, 2),
            named_range("b", 15, 20),
            launch(25, 3),
            *(kernel("stray", 30, correlation) for correlation in (1, 2, 3)),
        )
        == {}
    )


def test_copies_and_other_events_are_no_kernels() -> None:
    assert (
        names(
            named_range("a", 0, 10),
            launch(1, 1),
            launch(2, 2),
            launch(3, 3),
            kernel("copy", 20, 1, cat="gpu_memcpy"),
            kernel("set", 21, 2, cat="gpu_memset"),
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            {"ph": "X", "cat": "cpu_op", "name": "aten::add", "tid": MAIN, "ts": 4, "dur": 1},
        )
        == {}
    )


def test_each_thread_has_its_own_ranges() -> None:
    assert names(
        named_range("main", 0, 10, MAIN),
        named_range("worker", 0, 10, WORKER),
        launch(5, 1, WORKER),
        launch(6, 2, MAIN),
        launch(7, 3, thread=99),
        kernel("of worker", 20, 1),
        kernel("of main", 30, 2),
        kernel("of nobody", 40, 3),
    ) == {"main": ["of main"], "worker": ["of worker"]}


def test_a_range_that_comes_twice_collects_both() -> None:
    assert names(
        named_range("a", 0, 10),
        named_range("a", 20, 30),
        launch(25, 2),
        launch(5, 1),
        kernel("second", 40, 2),
        kernel("first", 50, 1),
    ) == {"a": ["first", "second"]}
