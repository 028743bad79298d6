"""From an annotated model to its execution plan."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxsched_runtime.device import Placement
from onnxsched_runtime.errors import AnnotationError, PlanError
from onnxsched_runtime.model import input_values, operations_from_model
from onnxsched_runtime.partition import plan_execution
from onnxsched_runtime.plan import ExecutionPlan


def plan_model(
    model: onnx.ModelProto,
    placements: Mapping[str, Placement],
    host_reasons: Mapping[str, str],
) -> ExecutionPlan:
    """Plan a model whose nodes are placed.

    Args:
        model: The model.
        placements: Node name to placement, in launch order.
        host_reasons: Why a node can't be captured, for those that can't.

    Raises:
        AnnotationError: The launch order, edited by hand perhaps, runs a node before one that
            it reads from.
    """
    inputs = [value.name for value in input_values(model)]
    outputs = [value.name for value in model.graph.output]
    operations = operations_from_model(model, placements, host_reasons)
    try:
        return plan_execution(operations, inputs, outputs)
    except PlanError as error:
        reason = str(error).rstrip(".")
        raise AnnotationError(
            f"The schedule of the model can't be run ({reason}); run `onnxsched optimize` again."
        ) from error
