"""The building blocks that the transformers share, over tensors [batch, positions, features]."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import onnx_graphsurgeon as gs

from sample_models.layers import Net

HEADS_FIRST = (0, 2, 1, 3)
HEADS_FIRST_TRANSPOSED = (0, 2, 3, 1)


def linear(
    net: Net, name: str, x: gs.Tensor, features: int, *, bias: bool = True, gain: float = 1.0
) -> gs.Variable:
    """Maps the last axis to `features`: `NAME/matmul` and, with a bias, `NAME/add`."""
    width = x.shape[-1]
    weight = net.normal(f"{name}/weight", (width, features), gain / sqrt(width))
    x = net.op(f"{name}/matmul", "MatMul", [x, weight], (*x.shape[:-1], features))
    if not bias:
        return x
    return net.add(f"{name}/add", x, net.normal(f"{name}/bias", (features,), 0.1))


def embed(net: Net, name: str, table: gs.Constant, rows: gs.Tensor) -> gs.Variable:
    """Looks up rows of a table [count, features]: one more axis than `rows`."""
    return net.op(name, "Gather", [table, rows], (*rows.shape, table.shape[1]), axis=0)


def reshape(net: Net, name: str, x: gs.Tensor, shape: Sequence[int]) -> gs.Variable:
    """Gives a tensor another shape with as many elements."""
    return net.op(name, "Reshape", [x, net.constant(f"{name}/shape", list(shape))], shape)


def transpose(net: Net, name: str, x: gs.Tensor, order: Sequence[int]) -> gs.Variable:
    """Reorders the axes."""
    shape = [x.shape[axis] for axis in order]
    return net.op(name, "Transpose", [x], shape, perm=list(order))


def split_heads(
    net: Net, name: str, x: gs.Tensor, heads: int, order: Sequence[int] = HEADS_FIRST
) -> gs.Variable:
    """Splits the features into heads: [batch, heads, positions, features / heads] by default."""
    batch, positions, features = x.shape
    x = reshape(net, f"{name}/reshape", x, (batch, positions, heads, features // heads))
    return transpose(net, f"{name}/transpose", x, order)


def padding_bias(net: Net, name: str, mask: gs.Tensor) -> gs.Variable:
    """Turns a mask [batch, positions] of ones and zeros into what to add to attention scores.

    Returns:
        [batch, 1, 1, positions], zero where the mask is one and the lowest float elsewhere.
    """
    batch, positions = mask.shape
    axes = net.constant(f"{name}/axes", [1, 2])
    x = net.op(f"{name}/unsqueeze", "Unsqueeze", [mask, axes], (batch, 1, 1, positions))
    x = net.op(f"{name}/cast", "Cast", [x], x.shape, np.float32, to=np.float32)
    x = net.elementwise(f"{name}/invert", "Sub", 1.0, x)
    return net.elementwise(f"{name}/scale", "Mul", x, float(np.finfo(np.float32).min))


def attend(
    net: Net,
    name: str,
    queries: gs.Tensor,
    keys: gs.Tensor,
    values: gs.Tensor,
    bias: gs.Tensor | None,
    scale: float | None = None,
) -> gs.Variable:
    """Scaled dot-product attention (Vaswani et al. 2017).

    Args:
        net: The graph.
        name: Hierarchical name of the block.
        queries: [batch, heads, positions, width].
        keys: [batch, heads, width, others], transposed.
        values: [batch, heads, others, width].
        bias: What to add to the scores [batch, heads, positions, others], if anything.
        scale: What to multiply the scores by, if anything.

    Returns:
        [batch, positions, heads * width].
    """
    batch, heads, positions, width = queries.shape
    shape = (batch, heads, positions, keys.shape[3])
    x = net.op(f"{name}/scores", "MatMul", [queries, keys], shape)
    if scale is not None:
        x = net.elementwise(f"{name}/scale", "Mul", x, scale)
    if bias is not None:
        x = net.add(f"{name}/bias", x, bias)
    x = net.op(f"{name}/softmax", "Softmax", [x], shape, axis=-1)
    x = net.op(f"{name}/context", "MatMul", [x, values], queries.shape)
    x = transpose(net, f"{name}/merge/transpose", x, HEADS_FIRST)
    return reshape(net, f"{name}/merge/reshape", x, (batch, positions, heads * width))
