"""Measure many schedules in milliseconds each, from one set of ORT sessions.

Every chain of operators has a session, made, warmed up and captured once. A schedule is then
only a set of edges between what was captured: those that the tensors need, and one between
neighbours on each of its streams. Putting that together as a graph takes no new session.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Self

from onnxsched.contraction import Contraction
from onnxsched.loading import Model
from onnxsched.schedule import Schedule
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.model import operations_from_model
from onnxsched_runtime.partition import assemble, readers_of, segments_of_run
from onnxsched_runtime.plan import ExecutionPlan, Segment

_SAMPLE_COUNT = 12


class TrialRunner:
    """The sessions of all chains of a model that is captured as a whole."""

    def __init__(
        self, model: Model, contraction: Contraction, device: Device, custom_ops: tuple[str, ...]
    ) -> None:
        """Create and warm up a session for each chain."""
        names = [node.name for node in model.proto.graph.node]
        placements = {
            names[member]: Placement(device, chain)
            for chain, group in enumerate(contraction.groups)
            for member in group
        }
        operations = operations_from_model(model.proto, placements, model.host_reasons)
        by_name = {operation.name: operation for operation in operations}
        self._inputs = tuple(model.bound_shapes)
        self._outputs = tuple(value.name for value in model.proto.graph.output)
        readers = readers_of(operations, self._outputs)
        self._segments: list[Segment] = []
        self._members: list[range] = []
        """The segments of each chain."""
        for group in contraction.groups:
            start = len(self._segments)
            self._segments += segments_of_run([by_name[names[m]] for m in group], readers)
            self._members.append(range(start, len(self._segments)))
        plan = assemble(self._segments, self._inputs, self._outputs)
        source = model.source
        self._runner = LaneRunner(source, plan, custom_ops)
        try:
            self._runner.prepare(plan.pieces[0])
        except BaseException:
            self.close()
            raise

    def measure_us(self, contracted: Schedule) -> tuple[float, ...]:
        """Device time of a schedule of the chains, as one CUDA graph.

        Raises:
            CaptureError: The model can't be captured.
        """
        piece = self.plan(contracted).pieces[0]
        graph = self._runner.capture(piece)
        try:
            main = self._runner.streams[piece.main]
            return cuda.time_launches_us(main, lambda: graph.launch(main), _SAMPLE_COUNT)
        finally:
            graph.close()

    def plan(self, contracted: Schedule) -> ExecutionPlan:
        """The chains ordered by what they read and by the streams of the schedule."""
        lanes: dict[Placement, list[int]] = {}
        for slot in contracted.slots:
            lanes.setdefault(slot.placement, []).extend(self._members[slot.operator])
        return assemble(
            self._segments,
            self._inputs,
            self._outputs,
            launch_order=[i for slot in contracted.slots for i in self._members[slot.operator]],
            order_edges=[pair for lane in lanes.values() for pair in pairwise(lane)],
        )

    def close(self) -> None:
        """Free the sessions."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
