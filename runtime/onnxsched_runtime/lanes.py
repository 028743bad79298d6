"""What each stream of a captured piece runs, as one session with marks in it. Pure.

Sessions are what costs memory: each has handles and workspaces of its own. So a stream has one,
however often others wait for it. Where they do is marked: a mark copies four bytes to an address
that nothing else is copied to, so that it is found in what was captured, and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxsched_runtime.device import Placement
from onnxsched_runtime.model import ModelPart, ModelSource
from onnxsched_runtime.plan import ExecutionPlan, Piece, Record, Run, Wait
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.wiring import Point

MARK = TensorType(TensorProto.FLOAT, (1,))
"""What a mark copies."""
MARK_SOURCE = "onnxsched/mark"
"""The input that every mark copies from."""


@dataclass(frozen=True)
class Lane:
    """The segments of one stream in one piece."""

    placement: Placement
    segments: tuple[int, ...]
    """Indices into the plan's segments, in launch order."""
    inputs: tuple[str, ...]
    """Tensors from other lanes, other pieces or the caller."""
    outputs: tuple[str, ...]
    """Tensors that others read."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The output of each mark, one between neighbouring segments."""
        return tuple(f"{MARK_SOURCE}/{number}" for number in range(1, len(self.segments)))


@dataclass(frozen=True)
class LanePlan:
    """The lanes of a piece and how they wait for each other."""

    lanes: tuple[Lane, ...]
    positions: tuple[tuple[int, ...], ...]
    """The launch position of each segment, by lane."""
    waits: tuple[tuple[Point, Point], ...]
    """From a point that is recorded to one that waits for it; chains are lanes."""
    starts: tuple[int, ...]
    """Lanes whose start waits for nothing but the start of the piece."""


def lanes_of(plan: ExecutionPlan, piece: Piece) -> LanePlan:
    """Sort the steps of a captured piece by stream. O(steps + segments)."""
    runs: dict[Placement, list[int]] = {piece.main: []}
    positions: dict[Placement, list[int]] = {piece.main: []}
    events: dict[int, tuple[Placement, int]] = {}
    waits: list[tuple[tuple[Placement, int], tuple[Placement, int]]] = []
    for number, step in enumerate(piece.steps):
        match step:
            case Run(index):
                placement = plan.segments[index].placement
                runs.setdefault(placement, []).append(index)
                positions.setdefault(placement, []).append(number)
            case Record(event, placement):
                events[event] = (placement, len(runs[placement]))
            case Wait(event, placement):
                waits.append((events[event], (placement, len(runs.get(placement, ())))))
    chain = {placement: number for number, placement in enumerate(runs)}
    end = (piece.main, len(runs[piece.main]))
    between = [
        (Point(chain[a], after), Point(chain[b], before))
        for (a, after), (b, before) in waits
        if after and (b, before) != end
    ]
    waiting = {point.chain for _, point in between if point.boundary == 0}
    return LanePlan(
        tuple(_lane(plan, placement, tuple(indices)) for placement, indices in runs.items()),
        tuple(tuple(numbers) for numbers in positions.values()),
        tuple(between),
        tuple(number for number in range(len(runs)) if number not in waiting),
    )


def lane_tensors(plan: ExecutionPlan) -> frozenset[str]:
    """What lies between lanes: the tensors that need fixed addresses."""
    lanes = [lane for p in plan.pieces if p.captured for lane in lanes_of(plan, p).lanes]
    return frozenset(t for lane in lanes for t in (*lane.inputs, *lane.outputs))


def _lane(plan: ExecutionPlan, placement: Placement, indices: tuple[int, ...]) -> Lane:
    own = set(indices)
    segments = [plan.segments[index] for index in indices]
    written = dict.fromkeys(t for segment in segments for t in segment.outputs)
    read = dict.fromkeys(t for segment in segments for t in segment.inputs if t not in written)
    needed = {t for i, s in enumerate(plan.segments) if i not in own for t in s.inputs}
    needed.update(plan.outputs)
    outputs = tuple(t for t in written if t in needed) or tuple(written)[-1:]
    return Lane(placement, indices, tuple(read), outputs)


def marked_part(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> ModelPart:
    """Cut a lane out as a model of its own, its nodes in launch order, with marks."""
    segments = [plan.segments[index] for index in lane.segments]
    names = [name for segment in segments for name in segment.nodes]
    inputs = [plan.original(tensor) for tensor in lane.inputs]
    part = source.part(names, inputs, lane.outputs)
    if not lane.marks:
        return part
    model = ModelProto.FromString(part.content)
    nodes = list(model.graph.node)
    marked: list[NodeProto] = []
    start = 0
    for segment, mark in zip(segments, (*lane.marks, None), strict=True):
        end = start + len(segment.nodes)
        marked += nodes[start:end]
        start = end
        if mark:
            marked.append(helper.make_node("Identity", [MARK_SOURCE], [mark], name=mark))
    ordered = [NodeProto.FromString(node.SerializeToString()) for node in marked]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    kind, shape = MARK.element_type, MARK.shape
    model.graph.input.append(helper.make_tensor_value_info(MARK_SOURCE, kind, shape))
    model.graph.output.extend(helper.make_tensor_value_info(m, kind, shape) for m in lane.marks)
    return ModelPart(model.SerializeToString(), part.weights)
