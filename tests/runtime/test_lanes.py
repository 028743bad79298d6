"""A lane is one model: its nodes in launch order, marks between segments, no copy for a view."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest

from onnxsched_runtime.lanes import MARK_SOURCE, Lane, lanes_of, marked_part, written_instead
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model
from support import models


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
