"""Inputs of a model: given, or seeded, varied, and with every index in range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxsched.loading import Model
from onnxsched_runtime.arguments import as_array
from onnxsched_runtime.errors import RunError, UsageError
from onnxsched_runtime.model import input_values
from onnxsched_runtime.tensor import TensorType

_INDEX_KEEPING = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze",
                  "Transpose", "Unsqueeze"}  # fmt: skip
"""Operators through which an index stays an index."""
_DRAWN_COUNT = 1 << 20


def with_given(model: Model, given: Mapping[str, np.ndarray]) -> Model:
    """The model with values for its inputs, or for some of them.

    Raises:
        UsageError: A value is for no input, or of another type or shape.
    """
    if not given:
        return model
    values = random_inputs(model.baseline, model.tensors, 0, given)
    return replace(model, given={name: values[name] for name in given})


def model_inputs(model: Model, seed: int) -> dict[str, np.ndarray]:
    """The values that a model was given for its inputs, and drawn ones for the others."""
    return random_inputs(model.baseline, model.tensors, seed, model.given)


def random_inputs(
    model: onnx.ModelProto,
    tensors: Mapping[str, TensorType],
    seed: int,
    given: Mapping[str, np.ndarray] = {},
) -> dict[str, np.ndarray]:
    """Draw a value for every input: normal floats, indices below what they index, else 0 or 1.

    Args:
        model: The model; used to find what integer inputs index.
        tensors: Types of the inputs, static.
        seed: Equal seeds give equal inputs.
        given: Values that are taken instead, by input.

    Raises:
        UsageError: A value is for no input, or of another type or shape.
    """
    generator = np.random.default_rng(seed)
    limits = _index_limits(model)
    drawn = {
        value.name: random_array(tensors[value.name], generator, limits.get(value.name, 2))
        for value in input_values(model)
        if value.name in tensors
    }
    if unknown := given.keys() - drawn.keys():
        raise UsageError(f"There is no input '{min(unknown)}'; the inputs are {list(drawn)}.")
    return drawn | {name: _fitting(name, given[name], drawn[name]) for name in given}


def _fitting(name: str, value: Any, like: np.ndarray) -> np.ndarray:
    """The value of an input, laid out as sessions take it.

    Raises:
        UsageError: It is of another type or shape than what is drawn.
    """
    array = np.asarray(as_array(name, value), order="C")
    if like.dtype.kind == "O" and array.dtype.kind == "U":
        array = array.astype(object)
    if array.shape != like.shape:
        raise UsageError(
            f"Input '{name}' takes shape {list(like.shape)}, got {list(array.shape)}; give a "
            "value of that shape, or optimize for another with --shape."
        )
    if array.dtype != like.dtype:
        wanted = "strings" if like.dtype.kind == "O" else like.dtype
        raise UsageError(f"Input '{name}' takes {wanted}, got {array.dtype}; convert it.")
    return array


@contextmanager
def random_blamed(feeds: Iterable[str], given: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Say of a run that fails that its inputs were drawn, unless all were given.

    Raises:
        RunError: The run failed.
    """
    try:
        yield
    except RunError as error:
        if given.keys() >= set(feeds):
            raise
        raise RunError(
            f"The model fails on random inputs ({str(error).rstrip('.')}); give real ones with "
            "--input NAME=FILE.npy."
        ) from error


def random_array(kind: TensorType, generator: np.random.Generator, limit: int = 1) -> np.ndarray:
    """Draw an array of a type; integers are below `limit`."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element_type)
    if kind.element_type == TensorProto.STRING:
        return np.full(kind.shape or (), "text", dtype=object)
    if dtype == np.bool_:
        return generator.integers(0, 2, kind.shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, limit, kind.shape).astype(dtype)
    return generator.standard_normal(kind.shape or ()).astype(dtype)


def repeated_array(kind: TensorType, generator: np.random.Generator) -> np.ndarray:
    """Draw as `random_array` does, but the same million numbers again and again.

    Good for what is timed, not for what is compared: a large image takes seconds to draw.
    """
    shape = kind.shape or ()
    if math.prod(shape) <= _DRAWN_COUNT:
        return random_array(kind, generator)
    drawn = random_array(TensorType(kind.element_type, (_DRAWN_COUNT,)), generator)
    return np.resize(drawn, shape)


def _index_limits(model: onnx.ModelProto) -> dict[str, int]:
    """For each input that is used as an index, the size of the smallest axis it indexes."""
    rows = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    limits: dict[str, int] = {}
    for value in model.graph.input:
        waiting, seen = [value.name], {value.name}
        while waiting:
            for node in readers.get(name := waiting.pop(), []):
                if node.op_type == "Gather" and node.input[1] == name and node.input[0] in rows:
                    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                    size = rows[node.input[0]][axis]
                    limits[value.name] = min(size, limits.get(value.name, size))
                elif node.op_type in _INDEX_KEEPING and node.input[0] == name:
                    waiting += [o for o in node.output if o not in seen]
                    seen.update(node.output)
    return limits
