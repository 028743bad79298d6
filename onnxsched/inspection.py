"""What an annotated model says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.device import Placement
from onnxsched_runtime.fields import damaged
from onnxsched_runtime.files import read_model
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model


@dataclass(frozen=True, slots=True)
class InspectedNode:
    """One node and where it runs."""

    name: str
    op_type: str
    placement: Placement
    order: int
    """Launch position."""
    segment: int
    duration_us: float | None
    """Alone on the device, as measured; None where it was not."""
    bound: str | None
    host_reason: str | None
    """Why it is not captured; None where it is."""


@dataclass(frozen=True)
class Inspection:
    """An annotated model, taken apart."""

    annotation: Annotation
    plan: ExecutionPlan
    nodes: tuple[InspectedNode, ...]
    """In launch order."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        details: Mapping[str, Any] = self.annotation.details
        return {
            "schema_version": 1,
            **{key: value for key, value in details.items() if key != "operators"},
            "pieces": [
                {"captured": piece.captured, "segments": list(piece.runs)}
                for piece in self.plan.pieces
            ],
            "segments": [
                {
                    "placement": str(segment.placement),
                    "nodes": list(segment.nodes),
                    "host_reason": segment.host_reason,
                }
                for segment in self.plan.segments
            ],
            "wait_count": self.plan.wait_count,
            "copies": [
                {"tensor": tensor, "device": str(self.plan.device_of[copy])}
                for copy, tensor in self.plan.copies.items()
            ],
            "nodes": [
                {
                    "name": node.name,
                    "op_type": node.op_type,
                    "device": str(node.placement.device),
                    "stream": node.placement.stream,
                    "order": node.order,
                    "segment": node.segment,
                    "duration_us": node.duration_us,
                    "bound": node.bound,
                    "host_reason": node.host_reason,
                }
                for node in self.nodes
            ],
        }


def inspect_model(path: str | os.PathLike[str]) -> Inspection:
    """Read a model's annotation and derive the plan that would run it.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no ONNX model, or carries no schedule that fits it.
    """
    model = read_model(path)
    annotation = read_annotation(model)
    plan = plan_model(model, annotation.placements, annotation.host_reasons)
    segment_of = {name: i for i, segment in enumerate(plan.segments) for name in segment.nodes}
    op_types = {node.name: node.op_type for node in model.graph.node}
    measured = _measured(annotation)
    nodes = []
    for order, (name, placement) in enumerate(annotation.placements.items()):
        duration_us, bound = measured.get(name, (None, None))
        reason = annotation.host_reasons.get(name)
        nodes.append(
            InspectedNode(
                name,
                op_types[name],
                placement,
                order,
                segment_of[name],
                None if reason else duration_us,
                None if reason else bound,
                reason,
            )
        )
    return Inspection(annotation, plan, tuple(nodes))


def _measured(annotation: Annotation) -> dict[str, tuple[float | None, str | None]]:
    """Of each node that was measured, how long it takes and what bounds it.

    Raises:
        AnnotationError: Someone has written something else there.
    """
    try:
        return {
            name: (None if duration_us is None else float(duration_us), bound)
            for name, (duration_us, bound) in annotation.details.get("operators", {}).items()
        }
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise damaged("field 'operators' is not as onnxsched writes it") from error
