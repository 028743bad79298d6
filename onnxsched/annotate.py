"""From a schedule to the annotation that a model carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxsched.loading import Model
from onnxsched.schedule import Schedule
from onnxsched_runtime.annotation import Annotation


def annotation_for(
    model: Model, schedule: Schedule, details: Mapping[str, Any] | None = None
) -> Annotation:
    """The annotation of a model's nodes by a schedule of its operators.

    Args:
        model: The model whose operators are scheduled.
        schedule: A schedule that passes `check_schedule`.
        details: What else the annotation tells people and tools.
    """
    names = [node.name for node in model.proto.graph.node]
    return Annotation(
        placements={names[slot.operator]: slot.placement for slot in schedule.slots},
        tensors=model.tensors,
        host_reasons=model.host_reasons,
        details=details or {},
    )
