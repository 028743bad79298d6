"""From a schedule to the annotation that the portable model carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxsched.loading import Model
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.lowering import origins, to_lowered, to_portable
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


def annotation_for(
    model: Model,
    schedule: Schedule,
    variant: Variant = DEFAULT_VARIANT,
    details: Mapping[str, Any] | None = None,
) -> Annotation:
    """The annotation of a model's nodes by a schedule of its operators.

    Args:
        model: The portable model whose operators are scheduled.
        schedule: A schedule that passes `check_schedule`.
        variant: How sessions execute the model.
        details: What else the annotation tells people and tools.
    """
    names = [node.name for node in model.proto.graph.node]
    return Annotation(
        placements={names[slot.operator]: slot.placement for slot in schedule.slots},
        tensors=model.tensors,
        host_reasons=model.host_reasons,
        variant=variant,
        details=details or {},
    )


def portable_schedule(model: Model, lowered: Model, schedule: Schedule) -> Schedule:
    """A schedule of a lowered model's operators as one of the portable model's."""
    if lowered.proto is model.proto:
        return schedule
    names = [node.name for node in lowered.proto.graph.node]
    placements = {names[slot.operator]: slot.placement for slot in schedule.slots}
    index = {node.name: number for number, node in enumerate(model.proto.graph.node)}
    carried = to_portable(placements, model.proto, lowered.proto)
    return Schedule(tuple(Slot(index[name], placement) for name, placement in carried.items()))


def lowered_schedule(model: Model, lowered: Model, schedule: Schedule) -> Schedule:
    """A schedule of a portable model's operators as one of the lowered model's."""
    if lowered.proto is model.proto:
        return schedule
    names = [node.name for node in model.proto.graph.node]
    placements = {names[slot.operator]: slot.placement for slot in schedule.slots}
    index = {node.name: number for number, node in enumerate(lowered.proto.graph.node)}
    carried = to_lowered(placements, model.proto, lowered.proto)
    return Schedule(tuple(Slot(index[name], placement) for name, placement in carried.items()))


def portable_refusals(model: Model, lowered: Model, refusals: Mapping[str, str]) -> dict[str, str]:
    """Refusals of a lowered model's nodes as ones of the portable model's.

    A node that stands for several, fused, is named after none: then all that are gone count.
    """
    origin = origins(model.proto, lowered.proto)
    gone = {node.name for node in model.proto.graph.node} - set(origin.values())
    return {
        name: why
        for node, why in refusals.items()
        for name in ([origin[node]] if node in origin else sorted(gone))
    }
