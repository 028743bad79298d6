"""Compare two model files, scheduled or plain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx

from onnxsched.comparison import Difference, Run, Tolerances, compare
from onnxsched.environment import choose_device
from onnxsched.inputs import random_inputs
from onnxsched.shapes import bind_shapes, tensor_types
from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.errors import AnnotationError, UsageError
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import read_model
from onnxsched_runtime.session import OrtSession, SessionSettings


def verify(
    actual: str | os.PathLike[str],
    expected: str | os.PathLike[str],
    *,
    tolerances: Tolerances,
    run_count: int = 3,
    seed: int = 0,
    device: str = "auto",
) -> tuple[Difference, ...]:
    """Run two models on the same seeded inputs and compare their outputs.

    A model with a schedule runs it on the schedule's device, any other in plain ONNX Runtime.

    Args:
        actual: The model in question.
        expected: The model that is right.
        tolerances: How far outputs may differ.
        run_count: How many different inputs, at least 1.
        seed: Of the first input.
        device: Where plain models run.

    Raises:
        UsageError: A file is missing, or the models have different inputs or outputs.
        ModelError: A model can't be read.
        DeviceError: A device is not available.
    """
    models = [read_model(path) for path in (actual, expected)]
    annotations = [_annotation(model) for model in models]
    shapes = next((_bound_shapes(a) for a in annotations if a is not None), {})
    for model, annotation in zip(models, annotations, strict=True):
        if annotation is None:
            bind_shapes(model, {n: s for n, s in shapes.items() if n in _inputs(model)})
    outputs = _same_ends(models, (actual, expected))
    types = tensor_types(models[1])
    feeds = [random_inputs(models[1], types, seed + number) for number in range(run_count)]
    with ExitStack() as stack:
        runs = [
            _open(Path(path), model, annotation, outputs, device, stack)
            for path, model, annotation in zip(
                (actual, expected), models, annotations, strict=True
            )
        ]
        return compare(runs[0], runs[1], outputs, feeds, tolerances)


def _annotation(model: onnx.ModelProto) -> Annotation | None:
    try:
        return read_annotation(model)
    except AnnotationError:
        if any(entry.key.startswith("onnxsched.") for entry in model.metadata_props):
            raise
        return None


def _bound_shapes(annotation: Annotation) -> dict[str, tuple[int, ...]]:
    shapes: Mapping[str, list[int]] = annotation.details.get("bound_shapes", {})
    return {name: tuple(shape) for name, shape in shapes.items()}


def _inputs(model: onnx.ModelProto) -> list[str]:
    weights = {weight.name for weight in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in weights]


def _same_ends(
    models: list[onnx.ModelProto], paths: tuple[str | os.PathLike[str], ...]
) -> list[str]:
    for what, names in (
        ("inputs", [_inputs(model) for model in models]),
        ("outputs", [[value.name for value in model.graph.output] for model in models]),
    ):
        if sorted(names[0]) != sorted(names[1]):
            raise UsageError(
                f"'{paths[0]}' and '{paths[1]}' have different {what}: {names[0]} and {names[1]}."
            )
    return [value.name for value in models[1].graph.output]


def _open(
    path: Path,
    model: onnx.ModelProto,
    annotation: Annotation | None,
    outputs: list[str],
    device: str,
    stack: ExitStack,
) -> Run:
    if annotation is not None:
        session = stack.enter_context(Session(model, annotation))
        return lambda feed: session.run(outputs, feed)
    settings = SessionSettings(choose_device(device), level="all", host_operators=True)
    plain = stack.enter_context(OrtSession(path, settings))
    return lambda feed: plain.run(feed, outputs)
