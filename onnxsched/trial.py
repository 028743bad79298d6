"""Measure schedules of a model's chains as CUDA graphs, without making sessions for each.

A chain of operators runs back to back on one stream in every schedule of the contracted graph, so
it has the same session in all of them, or over several devices one on each that it is tried on.
What the session launches is captured once. A trial puts captured runs together, with an edge for
every tensor, for neighbours on a stream and for every copy between devices, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Self

from onnxsched.contraction import Contraction
from onnxsched.inputs import model_inputs
from onnxsched.loading import Model
from onnxsched.schedule import Schedule
from onnxsched_runtime import cuda
from onnxsched_runtime.crossing import homes_of, with_copies
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.model import operations_from_model
from onnxsched_runtime.partition import assemble, readers_of, segments_of_run
from onnxsched_runtime.plan import ExecutionPlan, Operation, Piece, Run, Segment, name_on

_FIRST_COPY = 1 << 20
"""The streams of copies are beyond those of any schedule."""
_FEW, _MORE = 4, 8
_LONG_US = 1500.0
"""What takes so long varies little, and a few samples are enough."""


class TrialRunner:
    """The captured runs of all chains of a model that is captured as a whole."""

    def __init__(
        self,
        model: Model,
        contraction: Contraction,
        devices: Sequence[Device],
        custom_ops: tuple[str, ...],
    ) -> None:
        """Place tensors and weights on every device, and prepare what runs on one alone.

        Raises:
            CaptureError: The model can't be captured.
        """
        self._inputs = tuple(model.bound_shapes)
        self._outputs = tuple(value.name for value in model.proto.graph.output)
        self._segments: list[Segment] = []
        self._members: dict[tuple[int, Device], range] = {}
        """The segments of each chain on each device."""
        self._copies: dict[tuple[str, Device, Device], int] = {}
        """The segment that copies a tensor, as the model calls it, from one device to another."""
        self._names: dict[str, str] = {}
        """What tensors are called in the model, where each device has its own."""
        chains = _chains(model, contraction, devices[0], self._outputs)
        for device in devices:
            for chain, segments in enumerate(chains):
                start = len(self._segments)
                self._segments += [
                    segment if len(devices) == 1 else _on(segment, device) for segment in segments
                ]
                self._members[chain, device] = range(start, len(self._segments))
        if len(devices) > 1:
            written = [t for node in model.proto.graph.node for t in node.output if t]
            known = dict.fromkeys((*self._inputs, *written))
            self._names = {name_on(t, device): t for device in devices for t in known}
            self._add_copies(chains, devices)
        self._runner = LaneRunner(model.source, self._all(), custom_ops)
        try:
            self._fill_inputs(model)
            if len(devices) == 1:
                self._runner.prepare(self._runner.plan.pieces[0])
        except BaseException:
            self.close()
            raise

    def _add_copies(self, chains: Sequence[Sequence[Segment]], devices: Sequence[Device]) -> None:
        """A copy of every tensor that chains read, from every device to every other."""
        read = dict.fromkeys(t for segments in chains for s in segments for t in s.inputs)
        for source, target in permutations(devices, 2):
            for tensor in read:
                self._copies[tensor, source, target] = len(self._segments)
                placement = Placement(target, _FIRST_COPY + len(self._copies))
                reads, writes = name_on(tensor, source), name_on(tensor, target)
                self._segments.append(Segment((writes,), placement, (reads,), (writes,)))

    def _fill_inputs(self, model: Model) -> None:
        """Give inputs numbers: kernels that multiply zeros may take another time."""
        arrays = model_inputs(model, seed=0)
        runner = self._runner
        streams = {placement.device: stream for placement, stream in runner.streams.items()}
        for device, stream in streams.items():
            for tensor, array in arrays.items():
                buffer = runner.buffers.get(runner.plan.named(tensor, device))
                if buffer is not None:
                    buffer.fill(array, stream)
            stream.synchronize()

    def _all(self) -> ExecutionPlan:
        """All that schedules are put together from; over several devices it is never run so."""
        if not self._names:
            return assemble(self._segments, self._inputs, self._outputs)
        main = min(segment.placement for segment in self._segments)
        piece = Piece(True, main, tuple(map(Run, range(len(self._segments)))))
        return ExecutionPlan(tuple(self._segments), (piece,), (), tuple(self._names), self._names)

    def measure_us(self, contracted: Schedule) -> tuple[float, ...]:
        """Device time of a schedule of the chains, as one CUDA graph.

        Raises:
            CaptureError: The model can't be captured.
        """
        piece = self.plan(contracted).pieces[0]
        graph = self._runner.capture(piece)
        try:
            main = self._runner.streams[piece.main]
            samples_us = cuda.time_launches_us(main, lambda: graph.launch(main), _FEW)
            if min(samples_us) < _LONG_US:
                samples_us += cuda.time_launches_us(main, lambda: graph.launch(main), _MORE)
            return samples_us
        finally:
            graph.close()

    def plan(self, contracted: Schedule) -> ExecutionPlan:
        """The chains ordered by what they read and by the streams of the schedule."""
        streams: dict[int, Placement] = {}
        for slot in contracted.slots:
            members = self._members[slot.operator, slot.placement.device]
            streams |= dict.fromkeys(members, slot.placement)
        return assemble(
            self._segments,
            self._inputs,
            self._outputs,
            launch_order=self._with_copies(list(streams)),
            streams=streams,
            copies=self._names,
        )

    def _with_copies(self, order: Sequence[int]) -> list[int]:
        """Segments to launch, with the copies that plans have and where plans have them."""
        if not self._names:
            return list(order)
        original = self._runner.plan.original
        operations = [
            Operation(
                str(index),
                self._segments[index].placement,
                tuple(map(original, self._segments[index].inputs)),
                tuple(map(original, self._segments[index].outputs)),
            )
            for index in order
        ]
        home = homes_of(operations)
        launched, copies = with_copies(operations)
        return [
            self._copies[copies[o.name], home[copies[o.name]], o.placement.device]
            if o.name in copies
            else int(o.name)
            for o in launched
        ]

    def close(self) -> None:
        """Free what is still open."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chains(
    model: Model, contraction: Contraction, device: Device, outputs: Sequence[str]
) -> list[list[Segment]]:
    """The segments of each chain, which has a stream of its own."""
    names = [node.name for node in model.proto.graph.node]
    placements = {
        names[member]: Placement(device, chain)
        for chain, group in enumerate(contraction.groups)
        for member in group
    }
    operations = operations_from_model(model.proto, placements, model.host_reasons)
    by_name = {operation.name: operation for operation in operations}
    readers = readers_of(operations, outputs)
    return [
        segments_of_run([by_name[names[member]] for member in group], readers)
        for group in contraction.groups
    ]


def _on(segment: Segment, device: Device) -> Segment:
    """A segment on a device, whose tensors are called after it."""
    return replace(
        segment,
        placement=Placement(device, segment.placement.stream),
        inputs=tuple(name_on(tensor, device) for tensor in segment.inputs),
        outputs=tuple(name_on(tensor, device) for tensor in segment.outputs),
    )
