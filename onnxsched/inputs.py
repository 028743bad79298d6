"""Seeded inputs that a model accepts: varied, and with every index in range."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from onnxsched_runtime.model import input_values
from onnxsched_runtime.tensor import TensorType

_INDEX_KEEPING = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze",
                  "Transpose", "Unsqueeze"}  # fmt: skip
"""Operators through which an index stays an index."""
_DRAWN_COUNT = 1 << 20


def random_inputs(
    model: onnx.ModelProto, tensors: Mapping[str, TensorType], seed: int
) -> dict[str, np.ndarray]:
    """Draw a value for every input: normal floats, indices below what they index, else 0 or 1.

    Args:
        model: The model; used to find what integer inputs index.
        tensors: Types of the inputs, static.
        seed: Equal seeds give equal inputs.
    """
    generator = np.random.default_rng(seed)
    limits = _index_limits(model)
    return {
        value.name: random_array(tensors[value.name], generator, limits.get(value.name, 2))
        for value in input_values(model)
        if value.name in tensors
    }


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
