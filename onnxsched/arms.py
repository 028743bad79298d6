"""What a schedule is measured beside: which arms there are, and how each is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from onnxsched.loading import load_model
from onnxsched.shapes import bind_shapes
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError, naming
from onnxsched_runtime.execution import Executor, open_executor, plan_lowered
from onnxsched_runtime.executors.streams import Capture
from onnxsched_runtime.files import read_model
from onnxsched_runtime.model import input_values
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.source import ModelSource

ARMS: Mapping[str, str] = {
    "ort": "plain ONNX Runtime: with IOBinding, or on host arrays if part of it runs on the host",
    "ort-graph": "ONNX Runtime with its own CUDA graph",
    "sequential": "the model as one session of the schedule's variant in one CUDA graph",
    "schedule": "the annotated schedule in one CUDA graph",
    "schedule-ort": "the annotated schedule, each session captured by ONNX Runtime",
}
_GPU_ONLY = ("ort-graph", "schedule-ort")
SCHEDULE = "schedule"


def needed_by_ort_graph(annotation: Annotation, has_original: bool) -> str | None:
    """What is missing for ONNX Runtime's own CUDA graph; None where nothing is."""
    if annotation.host_reasons:  # ORT captures whole models only
        return "a model without host operators"
    if annotation.details.get("rewrite", "none") != "none" and not has_original:
        # A Split into unequal pieces ends the process when ORT captures it in its own layout.
        return "the model as it was before its operators were merged; give it with --original"
    return None


def arm_names(against: Sequence[str], device: Device, needed: str | None) -> list[str]:
    """The arms to measure, in the order of `ARMS`.

    Args:
        against: What is asked for; if empty, all that there can be but `schedule-ort`.
        device: The first of the schedule.
        needed: What ONNX Runtime's CUDA graph lacks, from `needed_by_ort_graph`.

    Raises:
        UsageError: There is no such arm, or not here.
    """
    if unknown := set(against) - ARMS.keys():
        raise UsageError(f"There is no arm '{min(unknown)}'; there are {', '.join(ARMS)}.")
    possible = [name for name in ARMS if device.kind == "cuda" or name not in _GPU_ONLY]
    if strangers := set(against) - set(possible):
        raise UsageError(f"Arm '{min(strangers)}' needs a GPU; the schedule is for {device}.")
    if needed:
        possible = [name for name in possible if name != "ort-graph"]
        if "ort-graph" in against:
            raise UsageError(f"Arm 'ort-graph' needs {needed}.")
    if not against:  # but for the arm whose streams would slow every other one's kernels
        return [name for name in possible if name != "schedule-ort"]
    plain = [] if {"ort", "ort-graph"} & set(against) else ["ort"]
    wanted = {*against, *plain, SCHEDULE}
    return [name for name in possible if name in wanted]


def baseline_of(
    model: onnx.ModelProto,
    annotation: Annotation,
    original: str | os.PathLike[str] | None,
    device: Device,
    custom_ops: tuple[str, ...],
) -> ModelSource:
    """What plain ONNX Runtime runs: the original if it is given, else the model as it is.

    Raises:
        UsageError: The original has other inputs, or they have other shapes.
    """
    if original is None:
        return ModelSource(model, annotation.tensors)
    shapes = annotation.bound_shapes
    given = read_model(original)
    theirs, ours = ([value.name for value in input_values(m)] for m in (given, model))
    if {*theirs} != {*ours}:
        raise UsageError(
            f"'{original}' has other inputs than the annotated model, {theirs} and not {ours}; "
            "give the model that was optimized."
        )
    try:
        bind_shapes(given, shapes)
    except UsageError as error:
        raise UsageError(
            f"The inputs of '{original}' do not take the shapes that the annotated model was made "
            "for; give the model that was optimized."
        ) from error
    with naming(original):
        loaded = load_model(Path(original), device, shapes, custom_ops)
    return ModelSource(loaded.baseline, loaded.tensors)


def open_arm(
    name: str,
    source: ModelSource,
    model: onnx.ModelProto,
    annotation: Annotation,
    custom_ops: tuple[str, ...],
) -> Executor:
    """The executor of an arm: all differ only in model, plan and capture."""
    main = Placement(annotation.devices[0], 0)
    if name in ("ort", "ort-graph"):
        placements = dict.fromkeys((n.name for n in source.model.graph.node), main)
        reasons = dict.fromkeys(placements, "in one session") if annotation.host_reasons else {}
        plan = plan_model(source.model, placements, reasons)
    else:
        if name == "sequential":
            annotation = replace(annotation, placements=dict.fromkeys(annotation.placements, main))
        plan = plan_lowered(model, annotation, source)
    capture: Mapping[str, Capture] = {"ort": "none", "ort-graph": "ort", "schedule-ort": "ort"}
    return open_executor(source, plan, capture=capture.get(name, "whole"), custom_ops=custom_ops)
