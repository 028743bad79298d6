"""Measure several requests in flight: copies of a schedule against copies in one stream.

A schedule makes one request fast by using what one stream leaves idle. With enough requests at a
time nothing is left idle, and one stream each, without events, may serve more of them.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsched.environment import describe_environment
from onnxsched.inputs import random_blamed, random_inputs
from onnxsched.racing import require_time
from onnxsched.summary import Summary, summarize
from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.execution import lowered_source
from onnxsched_runtime.files import read_model
from onnxsched_runtime.load import Session

ARMS: Mapping[str, str] = {
    "schedule": "copies of the annotated schedule, each on all of its devices",
    "sequential": "copies in one stream, as many on each device of the schedule",
}
COPIES = (1, 2, 4, 8)
"""How many copies are tried; of those in one stream as many on each device."""


@dataclass(frozen=True)
class Load:
    """One way to serve requests, kept busy."""

    arm: str
    """A name in `ARMS`."""
    in_flight: int
    """How many requests are served at a time."""
    requests_per_s: float
    latency: Summary
    """Of a request, host arrays in and out."""


@dataclass(frozen=True)
class ThroughputResult:
    """Every load, measured one after another."""

    model: str
    device: Device
    policy: str
    loads: tuple[Load, ...]
    environment: Mapping[str, Any]

    @property
    def best(self) -> Load:
        """The load that serves most requests."""
        return max(self.loads, key=lambda load: load.requests_per_s)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "schema_version": 1,
            "model": self.model,
            "device": str(self.device),
            "policy": self.policy,
            "arms": dict(ARMS),
            "loads": [dataclasses.asdict(load) for load in self.loads],
            "environment": dict(self.environment),
        }


def measure_throughput(
    path: str | os.PathLike[str],
    *,
    duration_s: float = 1.0,
    inputs: Mapping[str, np.ndarray] | None = None,
    custom_ops: Sequence[str] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ThroughputResult:
    """Serve an annotated model with more and more requests in flight.

    Every request in flight has a session and a thread of its own, which asks again as soon as it
    is answered.

    Args:
        path: An annotated model.
        duration_s: How long each load is kept up; every copy serves at least one request.
        inputs: Values for inputs; others are drawn at random.
        custom_ops: Shared libraries with custom operators.
        progress: Told what is being done.

    Raises:
        UsageError: There is no such file, or a value does not fit.
        AnnotationError: The model carries no schedule.
        DeviceError: A device of the schedule is not on this machine.
    """
    require_time("--duration", duration_s)
    model = read_model(path)
    annotation = read_annotation(model)
    libraries = tuple(custom_ops)
    lowered = lowered_source(model, annotation, libraries)
    feeds = random_inputs(model, annotation.tensors, 0, given := inputs or {})
    loads = []
    wanted = [(arm, count) for count in COPIES for arm in ARMS]
    for number, (arm, count) in enumerate(wanted):
        progress("serving", number, len(wanted))
        with ExitStack() as stack, random_blamed(feeds, given):
            sessions = [
                stack.enter_context(Session(model, copy, custom_ops=libraries, lowered=lowered))
                for copy in _copies(model, annotation, arm, count)
            ]
            latencies_us, elapsed_s = _served(sessions, feeds, duration_s)
        rate = len(latencies_us) / elapsed_s
        loads.append(Load(arm, len(sessions), rate, summarize(latencies_us)))
    return ThroughputResult(
        model=Path(path).name,
        device=annotation.devices[0],
        policy=str(annotation.details.get("policy", "")),
        loads=tuple(loads),
        environment=describe_environment(annotation.devices[0]),
    )


def _copies(
    model: onnx.ModelProto, annotation: Annotation, arm: str, count: int
) -> list[Annotation]:
    if arm == "schedule":
        return [annotation] * count
    names = [node.name for node in model.graph.node]
    return [
        replace(annotation, placements=dict.fromkeys(names, Placement(device, 0)))
        for device in annotation.devices
        for _ in range(count)
    ]


def _served(
    sessions: Sequence[Session], feeds: Mapping[str, np.ndarray], duration_s: float
) -> tuple[list[float], float]:
    """Latencies of all requests in microseconds, and the seconds that they took together."""
    latencies_us: list[list[float]] = [[] for _ in sessions]
    errors: list[BaseException] = []
    for session in sessions:
        session.run(None, feeds)
    start = threading.Barrier(len(sessions) + 1)
    end_ns = 0

    def serve(session: Session, kept: list[float]) -> None:
        start.wait()
        try:
            before_ns = time.perf_counter_ns()
            while not errors and (not kept or before_ns < end_ns):
                session.run(None, feeds)
                after_ns = time.perf_counter_ns()
                kept.append((after_ns - before_ns) / 1e3)
                before_ns = after_ns
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=serve, args=pair)
        for pair in zip(sessions, latencies_us, strict=True)
    ]
    for thread in threads:
        thread.start()
    start_ns = time.perf_counter_ns()
    end_ns = start_ns + int(duration_s * 1e9)
    start.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    elapsed_s = (time.perf_counter_ns() - start_ns) / 1e9
    return [us for kept in latencies_us for us in kept], elapsed_s
