"""Compare two model files, scheduled or plain."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx

from onnxsched.comparison import Difference, Run, Tolerances, compare
from onnxsched.environment import choose_device
from onnxsched.inputs import random_blamed, random_inputs
from onnxsched.shapes import bind_shapes, tensor_types
from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.errors import AnnotationError, ModelError, UsageError, naming
from onnxsched_runtime.files import read_model, serialized
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import input_values, name_nodes
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelPart


def verify(
    actual: str | os.PathLike[str],
    expected: str | os.PathLike[str],
    *,
    tolerances: Tolerances,
    run_count: int = 3,
    seed: int = 0,
    inputs: Mapping[str, np.ndarray] | None = None,
    device: str = "auto",
    custom_ops: Sequence[str] = (),
) -> tuple[Difference, ...]:
    """Run two models on the same seeded inputs and compare their outputs.

    A model with a schedule runs it on the schedule's device, any other in plain ONNX Runtime.

    Args:
        actual: The model in question.
        expected: The model that is right.
        tolerances: How far outputs may differ.
        run_count: How many different inputs, at least 1.
        seed: Of the first input.
        inputs: Values for inputs, the same in all runs; others are drawn at random.
        device: Where plain models run.
        custom_ops: Shared libraries with custom operators.

    Raises:
        UsageError: A file is missing, the models have different inputs or outputs, a value
            does not fit, or a tolerance names no output.
        ModelError: A model can't be read.
        DeviceError: A device is not available.
    """
    models = [read_model(path) for path in (actual, expected)]
    annotations = [
        _annotation(model, path) for model, path in zip(models, (actual, expected), strict=True)
    ]
    shapes = next((a.bound_shapes for a in annotations if a is not None), {})
    for path, model, annotation in zip((actual, expected), models, annotations, strict=True):
        if annotation is None:
            _bind(model, path, shapes)
    outputs = _same_ends(models, (actual, expected))
    _require_outputs(tolerances, outputs)
    types = tensor_types(models[1])
    given = inputs or {}
    feeds = [random_inputs(models[1], types, seed + number, given) for number in range(run_count)]
    with ExitStack() as stack, random_blamed(feeds[0], given):
        runs = [
            _open(Path(path), model, annotation, outputs, device, tuple(custom_ops), stack)
            for path, model, annotation in zip(
                (actual, expected), models, annotations, strict=True
            )
        ]
        return compare(runs[0], runs[1], outputs, feeds, tolerances)


def _annotation(model: onnx.ModelProto, path: str | os.PathLike[str]) -> Annotation | None:
    try:
        with naming(path):
            return read_annotation(model)
    except AnnotationError:
        if any(entry.key.startswith("onnxsched.") for entry in model.metadata_props):
            raise
        return None


def _bind(
    model: onnx.ModelProto, path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    names = {value.name for value in model.graph.input}
    try:
        bind_shapes(model, {name: shape for name, shape in shapes.items() if name in names})
    except UsageError as error:
        raise UsageError(
            f"The inputs of '{path}' have no fixed shapes that both models share; optimize one of "
            "the models for the shapes to compare, with --shape."
        ) from error


def _same_ends(
    models: list[onnx.ModelProto], paths: tuple[str | os.PathLike[str], ...]
) -> list[str]:
    """The names of the outputs, where both models have the same inputs and outputs."""
    for what, ends in (
        ("inputs", [_inputs(model) for model in models]),
        ("outputs", [sorted(value.name for value in model.graph.output) for model in models]),
    ):
        if ends[0] != ends[1]:
            raise UsageError(
                f"'{paths[0]}' and '{paths[1]}' have different {what}: {ends[0]} and {ends[1]}."
            )
    return [value.name for value in models[1].graph.output]


def _require_outputs(tolerances: Tolerances, outputs: list[str]) -> None:
    """Refuse tolerances that no output has: a typo would leave the common one in force."""
    for option, named in (
        ("--rtol", tolerances.relative_of),
        ("--atol", tolerances.absolute_of),
    ):
        if unknown := named.keys() - set(outputs):
            raise UsageError(
                f"{option} names '{min(unknown)}', which is no output; the outputs are {outputs}."
            )


def _inputs(model: onnx.ModelProto) -> list[str]:
    """Every input with its type, e.g. `x float[2x3]`."""
    names = [value.name for value in input_values(model)]
    types = tensor_types(model)
    if strange := [name for name in names if name not in types]:
        raise ModelError(
            f"Input '{strange[0]}' is a sequence, map or optional; only models whose inputs are "
            "tensors can be compared."
        )
    known = onnx.helper.get_all_tensor_dtypes()
    if broken := [name for name in names if types[name].element_type not in known]:
        raise ModelError(f"Input '{broken[0]}' has no element type; export the model again.")
    return sorted(f"{name} {types[name]}" for name in names)


def _open(
    path: Path,
    model: onnx.ModelProto,
    annotation: Annotation | None,
    outputs: list[str],
    device: str,
    custom_ops: tuple[str, ...],
    stack: ExitStack,
) -> Run:
    with naming(path):
        if annotation is not None:
            session = stack.enter_context(Session(model, annotation, custom_ops=custom_ops))
            return lambda feed: session.run(outputs, feed)
        settings = SessionSettings(
            choose_device(device), host_operators=True, custom_ops=custom_ops
        )
        plain = stack.enter_context(OrtSession(_with_names(model, path), settings))
        return lambda feed: plain.run(feed, outputs)


def _with_names(model: onnx.ModelProto, path: Path) -> Path | ModelPart:
    """A file as it is; but nodes of one name, which ORT refuses, get names of their own."""
    names = [node.name for node in model.graph.node if node.name]
    if len(set(names)) == len(names):
        return path
    name_nodes(model)
    content = serialized(model)
    return path if content is None else ModelPart(content, {})
