"""IOS: the best sequence of stages, each a few groups of operators side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.rank import durations_us
from onnxsched.schedule import Schedule, Slot
from onnxsched.stages import Stage, best_stages
from onnxsched_runtime.device import Placement

GROUP_SIZE = 3
"""Most operators in a group: r in the paper, and its default."""
GROUP_COUNT = 8
"""Most groups in a stage: s in the paper, and its default."""


def ios(graph: OperatorGraph, cost: CostModel, machine: Machine) -> Schedule:
    """IOS's stages on the first device, launched one after another.

    Ding et al., "IOS: Inter-Operator Scheduler for CNN Acceleration" (MLSys 2021), without its
    merging of convolutions, see `best_stages`. IOS puts a barrier between stages; here operators
    wait only for what they read, so a stage begins where the one before leaves a stream free, and
    no schedule is longer than the sum of its stages. Time: that of `best_stages`, and
    O(edges + n * streams in use).
    """
    device = machine.devices[0]
    group_count = min(GROUP_COUNT, machine.stream_count)
    stages = best_stages(graph, cost, device, GROUP_SIZE, group_count)
    return _on_streams(graph, durations_us(graph, cost, device), stages, machine)


def _on_streams(
    graph: OperatorGraph, duration_us: Sequence[float], stages: Sequence[Stage], machine: Machine
) -> Schedule:
    """Launch stage after stage, each group on the stream where it finishes first.

    The groups of a stage get different streams. Ties go to the stream of the predecessor that
    finishes last, which saves an event, then to the lowest. Streams not yet in use are all alike,
    so only the first is tried.
    """
    device = machine.devices[0]
    free_us = [0.0] * machine.stream_count
    finish_us: dict[int, float] = {}
    stream_of: dict[int, int] = {}
    used = 0
    for stage in stages:
        idle = set(range(machine.stream_count))
        for group in stage:
            inputs = [
                [p for p in graph.predecessors[v] if p in finish_us] for v in group.operators
            ]
            last = max(chain.from_iterable(inputs), key=finish_us.__getitem__, default=None)
            favourite = None if last is None else stream_of[last]
            ready_us = [max((finish_us[p] for p in read), default=0.0) for read in inputs]
            work_us = [duration_us[v] for v in group.operators]
            finishes_us = {
                stream: _finishes_us(free_us[stream], ready_us, work_us)
                for stream in idle.intersection(range(used + 1))
            }
            stream = min(finishes_us, key=lambda s: (finishes_us[s][-1], s != favourite, s))
            idle.remove(stream)
            used = max(used, stream + 1)
            free_us[stream] = finishes_us[stream][-1]
            finish_us.update(zip(group.operators, finishes_us[stream], strict=True))
            stream_of.update(dict.fromkeys(group.operators, stream))
    return Schedule(tuple(Slot(v, Placement(device, stream_of[v])) for v in stream_of))


def _finishes_us(
    start_us: float, ready_us: Sequence[float], work_us: Sequence[float]
) -> list[float]:
    """When operators finish that run one after another, each once it is ready."""
    finishes_us: list[float] = []
    for ready, work in zip(ready_us, work_us, strict=True):
        start_us = max(start_us, ready) + work
        finishes_us.append(start_us)
    return finishes_us
