"""From a Chrome trace of torch's profiler to the kernels of each named range. Pure.

Kernels are matched to the launch that caused them by CUPTI's correlation id, never by counting:
libraries launch through several entry points, and counting only some of them shifts every match.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from onnxsched.profile import KernelProfile

_LAUNCHES = {"cuda_runtime", "cuda_driver"}


def kernels_by_range(trace: Mapping[str, Any]) -> dict[str, tuple[KernelProfile, ...]]:
    """Collect the kernels launched inside each named range, in launch order.

    Ranges may not overlap on one thread. O(events x log(ranges)).

    Args:
        trace: A Chrome trace with `user_annotation`, `cuda_runtime`/`cuda_driver` and `kernel`
            events.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    kernels = {e["args"]["correlation"]: e for e in events if e.get("cat") == "kernel"}
    ranges: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            span = (event["ts"], event["ts"] + event["dur"], event["name"])
            ranges.setdefault(event["tid"], []).append(span)
    for spans in ranges.values():
        spans.sort()
    found: dict[str, list[KernelProfile]] = {}
    for event in sorted(events, key=lambda e: float(e["ts"])):
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") not in _LAUNCHES or correlation not in kernels:
            continue
        name = _enclosing(ranges.get(event["tid"], []), event["ts"])
        if name is not None:
            found.setdefault(name, []).append(_kernel(kernels[correlation]))
    return {name: tuple(launched) for name, launched in found.items()}


def _enclosing(spans: list[tuple[float, float, str]], time: float) -> str | None:
    position = bisect_right(spans, (time, float("inf"), "")) - 1
    if position < 0 or time > spans[position][1]:
        return None
    return spans[position][2]


def _kernel(event: Mapping[str, Any]) -> KernelProfile:
    args = event["args"]
    grid, block = args["grid"], args["block"]
    return KernelProfile(
        name=str(event["name"]),
        duration_us=float(event["dur"]),
        grid=(int(grid[0]), int(grid[1]), int(grid[2])),
        block=(int(block[0]), int(block[1]), int(block[2])),
        registers=int(args["registers per thread"]),
        shared_memory_nbytes=int(args["shared memory"]),
        occupancy=float(args["est. achieved occupancy %"]) / 100,
    )
