"""Convolution, pooling and padding in torch, by ONNX's rules for what lies outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from tools.torch_call import Call


def _explicit_pads(call: Call, kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Padding as ONNX writes it: all begins, then all ends."""
    mode = call.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.get("pads", [0] * 2 * len(kernel)))
    if mode == "VALID":
        return [0] * 2 * len(kernel)
    begins, ends = [], []
    strides = call.get("strides", [1] * len(kernel))
    sizes = call.shapes[0][2:]
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        span = dilation * (k - 1) + 1
        total = max(0, (math.ceil(size / stride) - 1) * stride + span - size)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def _padded(x: Any, pads: Sequence[int], value: float) -> Any:
    """Pad the trailing axes; torch wants the last axis first, begin and end side by side."""
    rank = len(pads) // 2
    pairs = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    return functional.pad(x, pairs, value=value)


def _by_rank(call: Call, functions: Sequence[Any]) -> Any:
    rank = len(call.shapes[0]) - 2
    if not 1 <= rank <= 3:
        raise call.refusal(f"{rank} spatial axes")
    return functions[rank - 1]


def conv(call: Call, x: Any, weight: Any, bias: Any = None) -> Any:
    """Convolve over one to three axes."""
    convolve = _by_rank(call, (torch.conv1d, torch.conv2d, torch.conv3d))
    kernel = call.shapes[1][2:]
    ones = [1] * len(kernel)
    dilations = list(call.get("dilations", ones))
    pads = _explicit_pads(call, kernel, dilations)
    begins = pads[: len(kernel)]
    if begins != pads[len(kernel) :]:
        x, begins = _padded(x, pads, 0.0), [0] * len(kernel)
    strides = list(call.get("strides", ones))
    return convolve(x, weight, bias, strides, begins, dilations, call.get("group", 1))


def max_pool(call: Call, x: Any) -> Any:
    """The maximum of each window."""
    pool = _by_rank(call, (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d))
    kernel = list(call.attributes["kernel_shape"])
    ones = [1] * len(kernel)
    dilations = list(call.get("dilations", ones))
    pads = _explicit_pads(call, kernel, dilations)
    begins = pads[: len(kernel)]
    if begins != pads[len(kernel) :] or any(
        2 * p > k for p, k in zip(begins, kernel, strict=True)
    ):
        x, begins = _padded(x, pads, -math.inf), [0] * len(kernel)
    strides = list(call.get("strides", ones))
    return pool(x, kernel, strides, begins, dilations, bool(call.get("ceil_mode", 0)))


def average_pool(call: Call, x: Any) -> Any:
    """The mean of each window."""
    pools = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
    pool = _by_rank(call, pools)
    kernel = list(call.attributes["kernel_shape"])
    ones = [1] * len(kernel)
    if list(call.get("dilations", ones)) != ones:
        raise call.refusal("dilations")
    pads = _explicit_pads(call, kernel, ones)
    begins, counts = pads[: len(kernel)], bool(call.get("count_include_pad", 0))
    round_up = bool(call.get("ceil_mode", 0))
    strides = list(call.get("strides", ones))
    if begins != pads[len(kernel) :]:
        if round_up or not counts:
            raise call.refusal("padding of unequal sides that does not count")
        x, begins = _padded(x, pads, 0.0), [0] * len(kernel)
    return pool(x, kernel, strides, begins, round_up, counts)


def global_average_pool(call: Call, x: Any) -> Any:
    """The mean over all positions."""
    return torch.mean(x, dim=list(range(2, len(call.shapes[0]))), keepdim=True)


def pad(call: Call, x: Any, *_: Any) -> Any:
    """Surround by a constant."""
    if call.get("mode", "constant") != "constant":
        raise call.refusal(f"mode {call.get('mode', '')}")
    rank = len(call.shapes[0])
    given = call.integers(1) or []
    axes = call.integers(3)
    pads = [0] * 2 * rank
    for number, axis in enumerate(range(rank) if axes is None else axes):
        pads[axis % rank] = given[number]
        pads[axis % rank + rank] = given[number + len(given) // 2]
    value = call.constants[2] if len(call.constants) > 2 else None
    return _padded(x, pads, 0.0 if value is None else value.item())
