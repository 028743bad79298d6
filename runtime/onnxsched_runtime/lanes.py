"""What each stream of a captured piece runs, as one session with marks in it. Pure.

Sessions are what costs memory: each has handles and workspaces of its own. So a stream has one,
however often others wait for it. Where they do is marked: a mark copies four bytes to an address
that nothing else is copied to, so that it is found in what was captured, and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.model import node_reads
from onnxsched_runtime.plan import ExecutionPlan, Piece, Record, Run, Wait
from onnxsched_runtime.source import ModelPart, ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.views import is_view
from onnxsched_runtime.wiring import Point

MARK = TensorType(TensorProto.FLOAT, (1,))
"""What a mark copies."""
MARK_SOURCE = "onnxsched/mark"
"""The input that every mark copies from."""
_TAKES_ANY_WEIGHT = {"Gather", "MatMul", "Gemm", "FusedMatMul"}


@dataclass(frozen=True)
class Lane:
    """The segments of one stream in one piece that one session runs, or one that none does."""

    placement: Placement
    segments: tuple[int, ...]
    """Indices into the plan's segments, in launch order."""
    inputs: tuple[str, ...]
    """Tensors from other lanes, other pieces or the caller."""
    outputs: tuple[str, ...]
    """Tensors that others read; where the run outlives its session, all that it writes."""
    outlives: bool = False
    """Whether its run may do without its session once it is captured; see `outliving`."""

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


_OnStream = tuple[Placement, int]
"""A stream, and how many of its segments are launched by then."""


def lanes_of(
    plan: ExecutionPlan,
    piece: Piece,
    known: dict[tuple[int, ...], Lane] | None = None,
    finish: Callable[[Lane], Lane] = lambda lane: lane,
) -> LanePlan:
    """Sort the steps of a captured piece by stream. O(steps + segments).

    What no session runs is a lane of its own, which waits for what is before it on its stream.

    Args:
        plan: What the piece takes its segments from.
        piece: Of this plan, or put together from its segments.
        known: Lanes by their segments; those that are missing are added.
        finish: Makes of each that is added what it is to be.
    """
    lanes = {} if known is None else known
    runs, position, waits = _by_stream(plan, piece)
    groups = [
        (placement, group)
        for placement, indices in runs.items()
        for group in _divided(plan, indices)
    ]
    place = {
        index: Point(chain, boundary)
        for chain, (_, group) in enumerate(groups)
        for boundary, index in enumerate(group)
    }
    between = [
        (_behind(place[runs[a][after - 1]]), place[runs[b][before]])
        for (a, after), (b, before) in waits
        if after and before < len(runs.get(b, ()))
    ]
    between += [
        (_behind(place[earlier]), place[later])
        for indices in runs.values()
        for earlier, later in pairwise(indices)
        if place[earlier].chain != place[later].chain
    ]
    waiting = {point.chain for _, point in between if point.boundary == 0}
    outputs: frozenset[str] | None = None
    for placement, group in groups:
        if tuple(group) not in lanes:
            outputs = frozenset(plan.outputs) if outputs is None else outputs
            lanes[tuple(group)] = finish(_lane(plan, placement, tuple(group), outputs))
    return LanePlan(
        tuple(lanes[tuple(group)] for _, group in groups),
        tuple(tuple(position[index] for index in group) for _, group in groups),
        tuple(between),
        tuple(number for number in range(len(groups)) if number not in waiting),
    )


def _by_stream(
    plan: ExecutionPlan, piece: Piece
) -> tuple[dict[Placement, list[int]], dict[int, int], list[tuple[_OnStream, _OnStream]]]:
    """The segments of each stream, the launch position of each, and who waits for whom."""
    runs: dict[Placement, list[int]] = {}
    position: dict[int, int] = {}
    events: dict[int, _OnStream] = {}
    waits: list[tuple[_OnStream, _OnStream]] = []
    for number, step in enumerate(piece.steps):
        match step:
            case Run(index):
                runs.setdefault(plan.segments[index].placement, []).append(index)
                position[index] = number
            case Record(event, placement):
                events[event] = (placement, len(runs.get(placement, ())))
            case Wait(event, placement):
                waits.append((events[event], (placement, len(runs.get(placement, ())))))
    return runs, position, waits


def _divided(plan: ExecutionPlan, indices: Sequence[int]) -> list[list[int]]:
    """The segments of a stream that one session runs, and each that none does."""
    own = [index for index in indices if not plan.segments[index].is_fused]
    groups = [[index] for index in indices if plan.segments[index].is_fused]
    return [own, *groups] if own else groups


def _behind(point: Point) -> Point:
    return Point(point.chain, point.boundary + 1)


def lane_tensors(plan: ExecutionPlan, lanes: Iterable[Lane]) -> dict[str, Device]:
    """The tensors that need fixed addresses, and on which device."""
    written = {t: lane.placement.device for lane in lanes for t in lane.outputs}
    return written | {t: plan.device_of[t] for lane in lanes for t in lane.inputs}


def _lane(
    plan: ExecutionPlan,
    placement: Placement,
    indices: tuple[int, ...],
    outputs: frozenset[str],
) -> Lane:
    own = set(indices)
    segments = [plan.segments[index] for index in indices]
    written = dict.fromkeys(t for segment in segments for t in segment.outputs)
    read = dict.fromkeys(t for segment in segments for t in segment.inputs if t not in written)
    readers = plan.readers
    needed = [t for t in written if t in outputs or not own.issuperset(readers.get(t, ()))]
    return Lane(placement, indices, tuple(read), tuple(needed or tuple(written)[-1:]))


def written_instead(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> dict[str, str]:
    """For outputs that are views of another tensor of the lane, that tensor as the model calls it.

    ORT makes no kernel for a Reshape inside a session, but has to copy where its result needs an
    address of its own. So what it reads is written there, in another shape.
    """
    writer = {
        tensor: node
        for index in lane.segments
        for node in (source.nodes[name] for name in plan.segments[index].nodes)
        for tensor in node.output
    }
    taken = {plan.original(tensor) for tensor in lane.outputs}
    found = {}
    for tensor in lane.outputs:
        origin = plan.original(tensor)
        while origin in writer and _is_view(source, writer[origin]):
            origin = writer[origin].input[0]
        if origin in writer and origin not in taken:
            found[tensor] = origin
            taken.add(origin)
    return found


def touched_places(
    source: ModelSource, plan: ExecutionPlan, lanes: Sequence[Lane]
) -> dict[str, frozenset[int]]:
    """For the tensors of sessions' lanes the segments that use their places, under any name.

    Inside a session a view has the place of what it views: that is read until the last view of it
    is, and written when that is which `written_instead` names. O(nodes).
    """
    uses: dict[str, set[int]] = {}
    for lane in lanes:
        instead = written_instead(source, plan, lane)
        own = {plan.original(tensor): tensor for tensor in lane.outputs if tensor not in instead}
        place = {plan.original(tensor): tensor for tensor in lane.inputs}
        place |= own
        place |= {origin: tensor for tensor, origin in instead.items()}
        for index in lane.segments:
            for node in (source.nodes[name] for name in plan.segments[index].nodes):
                for tensor in (*node_reads(node), *node.output):
                    if tensor in place:
                        uses.setdefault(place[tensor], set()).add(index)
                if is_view(node) and node.input[0] in place and node.output[0] not in own:
                    place[node.output[0]] = place[node.input[0]]
    return {tensor: frozenset(indices) for tensor, indices in uses.items()}


def _is_view(source: ModelSource, node: NodeProto) -> bool:
    fixed = all(source.is_weight(name) for name in node.input[1:] if name)
    return is_view(node) and fixed


def shared_weights(
    source: ModelSource, plan: ExecutionPlan, lanes: Sequence[Lane]
) -> dict[Lane, tuple[str, ...]]:
    """The large weights that each lane reads and others of its device do, too.

    Each session would have a copy: a language model reads its table first and last. Only where an
    operator takes a weight as it takes any tensor; convolutions prepare theirs. O(nodes).
    """
    reads: dict[Lane, dict[str, None]] = {}
    unfit: set[str] = set()
    for lane in lanes:
        own = reads.setdefault(lane, {})
        for name in (n for index in lane.segments for n in plan.segments[index].nodes):
            node = source.nodes[name]
            found = [t for t in node_reads(node) if source.large_weight(t) is not None]
            own.update(dict.fromkeys(found))
            unfit.update(found if node.op_type not in _TAKES_ANY_WEIGHT else ())
    counts = Counter((lane.placement.device, name) for lane in reads for name in reads[lane])
    return {
        lane: tuple(n for n in own if counts[lane.placement.device, n] > 1 and n not in unfit)
        for lane, own in reads.items()
    }


def marked_part(
    source: ModelSource, plan: ExecutionPlan, lane: Lane, shared: Sequence[str] = ()
) -> ModelPart:
    """Cut a lane out as a model of its own, its nodes in launch order, with marks.

    Its outputs are those of the lane, or what `written_instead` says.

    Args:
        source: The model.
        plan: The plan that the lane is of.
        lane: The lane.
        shared: Weights that are inputs of it.
    """
    instead = written_instead(source, plan, lane)
    outputs = [instead.get(tensor) or plan.original(tensor) for tensor in lane.outputs]
    segments = _read_nodes(source, plan, lane, outputs)
    inputs = [*map(plan.original, lane.inputs), *shared]
    part = source.part([name for segment in segments for name in segment], inputs, outputs)
    if not lane.marks:
        return part
    model = ModelProto.FromString(part.content)
    nodes = {node.name: node for node in model.graph.node}
    marked: list[NodeProto] = []
    for segment, mark in zip(segments, (*lane.marks, None), strict=True):
        marked += [NodeProto.FromString(nodes[name].SerializeToString()) for name in segment]
        if mark:
            marked.append(helper.make_node("Identity", [MARK_SOURCE], [mark], name=mark))
    del model.graph.node[:]
    model.graph.node.extend(marked)
    kind, shape = MARK.element_type, MARK.shape
    model.graph.input.append(helper.make_tensor_value_info(MARK_SOURCE, kind, shape))
    model.graph.output.extend(helper.make_tensor_value_info(m, kind, shape) for m in lane.marks)
    return ModelPart(model.SerializeToString(), part.weights)


def _read_nodes(
    source: ModelSource, plan: ExecutionPlan, lane: Lane, outputs: Sequence[str]
) -> list[list[str]]:
    """The nodes of each segment, without views that nothing in the lane reads any more."""
    needed = set(outputs)
    segments = []
    for index in reversed(lane.segments):
        kept = []
        for name in reversed(plan.segments[index].nodes):
            node = source.nodes[name]
            if needed.intersection(node.output) or not _is_view(source, node):
                kept.append(name)
                needed.update(node_reads(node))
        segments.append(kept[::-1])
    return segments[::-1]
