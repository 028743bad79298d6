"""ONNX operators as calls of torch: what a PyTorch user would write for each."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tools import torch_windows as windows
from tools.torch_call import Call, Lowering, torch_type

SCALAR_OPERANDS = {"Add", "Sub", "Mul", "Div", "Pow"}
"""Operators for which a constant of rank 0 becomes a Python number."""


def _div(call: Call, a: Any, b: Any) -> Any:
    return a / b if call.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _cast(call: Call, x: Any) -> Any:
    return x.to(torch_type(call.attributes["to"]))


def _batch_norm(call: Call, x: Any, scale: Any, shift: Any, mean: Any, variance: Any) -> Any:
    if call.get("training_mode", 0):
        raise call.refusal("training_mode")
    epsilon = call.get("epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, shift, eps=epsilon)


def _layer_norm(call: Call, x: Any, scale: Any, shift: Any = None) -> Any:
    shape = call.shapes[0]
    normalized = list(shape[call.get("axis", -1) % len(shape) :])
    epsilon = call.get("epsilon", 1e-5)
    if list(call.shapes[1]) == normalized and call.output_count == 1:
        return functional.layer_norm(x, normalized, scale, shift, epsilon)
    raise call.refusal("a scale that broadcasts, or the mean as an output")


def _softmax(call: Call, x: Any) -> Any:
    if call.opset >= 13:
        return torch.softmax(x, call.get("axis", -1))
    shape = call.shapes[0]  # up to opset 12 all axes from this one on are one
    axis = call.get("axis", 1) % len(shape)
    flat = x.reshape([math.prod(shape[:axis]), math.prod(shape[axis:])])
    return torch.softmax(flat, 1).reshape(list(shape))


def _gemm(call: Call, a: Any, b: Any, c: Any = None) -> Any:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    bias_fits = c is None or (len(call.shapes[2]) == 1 and beta == 1.0)
    if alpha == 1.0 and bias_fits and call.get("transB", 0) and not call.get("transA", 0):
        return functional.linear(a, b, c)
    a = a.t() if call.get("transA", 0) else a
    b = b.t() if call.get("transB", 0) else b
    product = torch.matmul(a, b)
    product = product if alpha == 1.0 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


def _gather(call: Call, data: Any, indices: Any) -> Any:
    axis = call.get("axis", 0) % len(call.shapes[0])
    size = call.shapes[0][axis]
    if (known := call.constants[1]) is None:
        return data[(slice(None),) * axis + (indices,)]  # takes negative indices as ONNX does
    wanted = [int(index) % size for index in known.flatten().tolist()]
    if known.ndim == 0:
        return data.select(axis, wanted[0])
    if known.ndim == 1 and wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        return data.narrow(axis, wanted[0], len(wanted))
    return data[(slice(None),) * axis + (indices,)]


def _reduce(function: Any) -> Lowering:
    def lower(call: Call, x: Any, *_: Any) -> Any:
        axes = call.axes()
        if not axes and call.get("noop_with_empty_axes", 0):
            return x
        return function(
            x, dim=axes or list(range(len(call.shapes[0]))), keepdim=bool(call.get("keepdims", 1))
        )

    return lower


def _reshape(call: Call, x: Any, *_: Any) -> Any:
    wanted = call.integers(1) or []
    if not call.get("allowzero", 0):
        wanted = [call.shapes[0][i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(call: Call, x: Any) -> Any:
    shape = call.shapes[0]
    axis = call.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return x.reshape([math.prod(shape[:axis]), math.prod(shape[axis:])])


def _transpose(call: Call, x: Any) -> Any:
    return x.permute(list(call.get("perm", range(len(call.shapes[0]))[::-1])))


def _squeeze(call: Call, x: Any, *_: Any) -> Any:
    shape = call.shapes[0]
    axes = call.axes()
    gone = [i for i, n in enumerate(shape) if n == 1] if axes is None else axes
    dropped = {axis % len(shape) for axis in gone}
    return x.reshape([n for i, n in enumerate(shape) if i not in dropped])


def _unsqueeze(call: Call, x: Any, *_: Any) -> Any:
    axes = call.axes() or []
    rank = len(call.shapes[0]) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(call: Call, x: Any, *_: Any) -> Any:
    return x.expand(list(np.broadcast_shapes(call.shapes[0], tuple(call.integers(1) or ()))))


def _slice(call: Call, x: Any, *_: Any) -> Any:
    shape = call.shapes[0]
    starts, ends = call.integers(1) or [], call.integers(2) or []
    axes, steps = call.integers(3), call.integers(4)
    chosen = [slice(None)] * len(shape)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[number] % len(shape) if axes else number
        step = steps[number] if steps else 1
        if step < 0:
            raise call.refusal("a negative step")
        size = shape[axis]
        chosen[axis] = slice(max(start, -size), min(end, size), step)
    return x[tuple(chosen)]


def _split(call: Call, x: Any, *_: Any) -> Any:
    axis = call.get("axis", 0) % len(call.shapes[0])
    size, count = call.shapes[0][axis], call.output_count
    sizes = call.get("split", None)
    sizes = call.integers(1) if sizes is None else sizes
    if sizes is None:
        each = math.ceil(size / count)
        sizes = [min(each, size - each * number) for number in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    return tuple(
        x.narrow(axis, start, length) for start, length in zip(starts, sizes, strict=True)
    )


def _plain(function: Callable[..., Any]) -> Lowering:
    return lambda call, *operands: function(*operands)


LOWERINGS: Mapping[str, Lowering] = {
    "Add": _plain(operator.add),
    "AveragePool": windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Concat": lambda call, *xs: torch.cat(list(xs), call.attributes["axis"]),
    "Conv": windows.conv,
    "Div": _div,
    "Erf": _plain(torch.erf),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "LayerNormalization": _layer_norm,
    "MatMul": _plain(torch.matmul),
    "MaxPool": windows.max_pool,
    "Mul": _plain(operator.mul),
    "Pad": windows.pad,
    "Pow": _plain(operator.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(operator.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
"""By ONNX operator type: those of the zoo and of usual exports of such models."""
