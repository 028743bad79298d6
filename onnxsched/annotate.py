"""From a schedule to the annotation that the portable model carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from onnxsched.loading import Model
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Placement
from onnxsched_runtime.kernels import Kernels
from onnxsched_runtime.lowering import origins, to_lowered, to_portable
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


def annotation_for(
    model: Model,
    schedule: Schedule,
    variant: Variant = DEFAULT_VARIANT,
    details: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
) -> Annotation:
    """The annotation of a model's nodes by a schedule of its operators.

    Args:
        model: The portable model whose operators are scheduled.
        schedule: A schedule that passes `check_schedule`.
        variant: How sessions execute the model.
        details: What else the annotation tells people and tools.
        kernels: The kernels of its convolutions and pools, where they were measured.
    """
    return Annotation(
        placements=_placements(model.proto, schedule),
        tensors=model.tensors,
        host_reasons=model.host_reasons,
        variant=variant,
        kernels=kernels or {},
        details=details or {},
    )


def portable_schedule(model: Model, lowered: Model, schedule: Schedule) -> Schedule:
    """A schedule of a lowered model's operators as one of the portable model's."""
    if lowered.proto is model.proto:
        return schedule
    placements = _placements(lowered.proto, schedule)
    return _schedule(model.proto, to_portable(placements, model.proto, lowered.proto))


def lowered_schedule(model: Model, lowered: Model, schedule: Schedule) -> Schedule:
    """A schedule of a portable model's operators as one of the lowered model's."""
    if lowered.proto is model.proto:
        return schedule
    placements = _placements(model.proto, schedule)
    return _schedule(lowered.proto, to_lowered(placements, model.proto, lowered.proto))


def _placements(proto: onnx.ModelProto, schedule: Schedule) -> dict[str, Placement]:
    """The stream of each node by name, in launch order."""
    names = [node.name for node in proto.graph.node]
    return {names[slot.operator]: slot.placement for slot in schedule.slots}


def _schedule(proto: onnx.ModelProto, placements: Mapping[str, Placement]) -> Schedule:
    """The schedule of a model whose nodes are placed so, in launch order."""
    index = {node.name: number for number, node in enumerate(proto.graph.node)}
    return Schedule(tuple(Slot(index[name], placement) for name, placement in placements.items()))


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
