"""A lane is one model: its nodes in launch order, marks between segments, no copy for a view."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import onnx
import pytest
from hypothesis import given, settings

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.lanes import (
    MARK_SOURCE,
    Lane,
    lanes_of,
    marked_part,
    shared_weights,
    written_instead,
)
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.wiring import Point
from support import models
from support.plans import Problem, closure, problems


def planned(
    model: onnx.ModelProto, streams: Sequence[int]
) -> tuple[ModelSource, ExecutionPlan, tuple[Lane, ...]]:
    annotation = models.annotation_of(model, streams)
    plan = plan_model(model, annotation.placements, annotation.host_reasons)
    source = ModelSource(model, annotation.tensors)
    return source, plan, lanes_of(plan, plan.pieces[0]).lanes


def nodes_of(source: ModelSource, plan: ExecutionPlan, lane: Lane) -> list[str]:
    """The node that writes each line of a lane's model, by what it writes."""
    part = onnx.ModelProto.FromString(marked_part(source, plan, lane).content)
    return [node.output[0] for node in part.graph.node]


@pytest.mark.parametrize("name", ["diamond", "fork_join", "two_towers", "views"])
def test_marks_stand_between_segments(name: str) -> None:
    source, plan, lanes = planned(models.MODELS[name](), (1, 2))
    for lane in lanes:
        written = nodes_of(source, plan, lane)
        assert [tensor for tensor in written if tensor.startswith(MARK_SOURCE)] == [*lane.marks]
        assert len(lane.marks) == len(lane.segments) - 1
        position = 0
        for number, index in enumerate(lane.segments):
            names = [source.nodes[n].output[0] for n in plan.segments[index].nodes]
            own = [tensor for tensor in written[position:] if tensor in names]
            assert written[position : position + len(own)] == own
            position += len(own)
            if number < len(lane.marks):
                assert written[position] == lane.marks[number]
                position += 1
        assert position == len(written)


def test_what_a_view_views_is_written_in_its_place() -> None:
    source, plan, (first, _) = planned(models.views(), (1, 1, 1, 1, 2, 2, 2, 1, 1))
    assert set(first.outputs) == {"tall", "flat", "lifted"}
    assert written_instead(source, plan, first) == {"tall": "a", "lifted": "d"}
    left = [t for t in nodes_of(source, plan, first) if not t.startswith(MARK_SOURCE)]
    assert left == ["a", "flat", "d"], "flat views it too, but only one can have its place"


def test_what_others_read_keeps_its_own_place() -> None:
    source, plan, (first, second) = planned(models.views(), (1, 1, 1, 1, 2, 2, 2, 2, 2))
    assert "a" in first.outputs
    assert written_instead(source, plan, first) == {}
    assert written_instead(source, plan, second) == {"lifted": "d"}


def test_a_view_of_what_comes_from_elsewhere_is_copied() -> None:
    source, plan, lanes = planned(models.views(), (1, 2, 2, 1, 3, 3, 3, 1, 1))
    (viewing,) = [lane for lane in lanes if "tall" in lane.outputs]
    assert written_instead(source, plan, viewing) == {}
    assert nodes_of(source, plan, viewing) == ["wide", "tall"]


@settings(deadline=None)
@given(problem=problems(max_operations=14, streams=3))
def test_a_fused_segment_is_a_lane_of_its_own_and_waits_keep_the_order_of_its_stream(
    problem: Problem,
) -> None:
    plan = problem.plan()
    for piece in (piece for piece in plan.pieces if piece.captured):
        found = lanes_of(plan, piece)
        place: dict[int, Point] = {}
        edges = [((recorded, 0), (waiting, 1)) for recorded, waiting in found.waits]
        for number, lane in enumerate(found.lanes):
            fused = [plan.segments[index].is_fused for index in lane.segments]
            assert fused == [True] or not any(fused)
            for boundary, index in enumerate(lane.segments):
                place[index] = here = Point(number, boundary)
                edges += [((here, 0), (here, 1)), ((here, 1), (after(here), 0))]
        sessions = [lane for lane in found.lanes if not plan.segments[lane.segments[0]].is_fused]
        assert len({lane.placement for lane in sessions}) == len(sessions)
        order = closure(edges)
        on: dict[Placement, list[int]] = {}
        for index in piece.runs:
            on.setdefault(plan.segments[index].placement, []).append(index)
        for earlier, later in (pair for indices in on.values() for pair in pairwise(indices)):
            assert ((after(place[earlier]), 0), (place[later], 1)) in order


@settings(deadline=None)
@given(problem=problems(max_operations=14, streams=3))
def test_what_a_graph_uploads_is_there_before_any_lane_starts(problem: Problem) -> None:
    plan = problem.plan()
    for piece in (piece for piece in plan.pieces if piece.captured):
        found = lanes_of(plan, piece)
        every = range(len(found.lanes))
        edges = [((recorded, 0), (waiting, 1)) for recorded, waiting in found.waits]
        for number in every:
            boundaries = [Point(number, n) for n in range(1 + len(found.lanes[number].segments))]
            edges += [((one, 0), (one, 1)) for one in boundaries]
            edges += [((one, 1), (other, 0)) for one, other in pairwise(boundaries)]
        waiting = {point for _, point in found.waits}
        assert waiting.isdisjoint(Point(number, 0) for number in found.starts)
        uploaded = (Point(len(every), 1), 0)
        edges += [(uploaded, (Point(number, 0), 1)) for number in found.starts]
        order = closure(edges)
        assert all((uploaded, (Point(number, 0), 1)) in order for number in every)


def after(point: Point) -> Point:
    """The boundary behind a segment; each has a side where events are recorded, and one behind."""
    return Point(point.chain, point.boundary + 1)


def tied(last: str = "Gemm<transB = 1>(hidden, table)") -> onnx.ModelProto:
    """A model that reads its table first and last."""
    return models.model_of(
        f"""(int64[4] x) => (float[4,64] y) {{
            rows = Gather(table, x)
            hidden = Tanh(rows)
            y = {last}
        }}""",
        table=models.weight(64, 16),
        other=models.weight(16, 64),
        small=models.weight(16, 1),
    )


def test_a_weight_that_two_lanes_read_flows_into_both() -> None:
    source, plan, lanes = planned(tied(), (1, 2, 2))
    shared = shared_weights(source, plan, lanes)
    assert shared == dict.fromkeys(lanes, ("table",))
    for lane in lanes:
        part = marked_part(source, plan, lane, shared[lane])
        model = onnx.ModelProto.FromString(part.content)
        assert "table" in {value.name for value in model.graph.input}
        assert "table" not in {w.name for w in model.graph.initializer} | part.weights.keys()


@pytest.mark.parametrize(
    ("last", "streams"),
    [
        ("Gemm<transB = 1>(hidden, table)", (1, 1, 1)),
        ("MatMul(hidden, other)", (1, 2, 2)),
        ("Transpose<perm = [1, 0]>(table)", (1, 1, 2)),
    ],
    ids=["one lane", "others", "an operator that may prepare it"],
)
def test_other_weights_stay_with_their_lanes(last: str, streams: tuple[int, ...]) -> None:
    model = tied(last)
    if "Transpose" in last:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 16
    source, plan, lanes = planned(model, streams)
    assert not any(shared_weights(source, plan, lanes).values())


def test_each_device_has_a_copy_of_its_own() -> None:
    model = tied()
    names = [node.name for node in model.graph.node]
    placements = {
        name: Placement(Device("cuda", index), 0)
        for name, index in zip(names, (0, 1, 1), strict=True)
    }
    plan = plan_model(model, placements, {})
    source = ModelSource(model, models.annotation_of(model, (1, 2, 2)).tensors)
    lanes = lanes_of(plan, plan.pieces[0]).lanes
    lanes = tuple(lane for lane in lanes if not plan.is_copy(lane.segments[0]))
    assert len(lanes) == 2
    assert not any(shared_weights(source, plan, lanes).values())
