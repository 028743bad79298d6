"""BERT-base, uncased: Devlin et al. 2018, "BERT"."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from sample_models.errors import ModelError
from sample_models.layers import Net
from sample_models.transformer import (
    HEADS_FIRST,
    HEADS_FIRST_TRANSPOSED,
    attend,
    embed,
    linear,
    padding_bias,
    split_heads,
)

_LAYERS = 12
_HEADS = 12
_HIDDEN = 768
_INTERMEDIATE = 3072
_WORDS = 30522
_POSITIONS = 512
_TOKEN_TYPES = 2


def bert(sequence: int, batch: int) -> onnx.ModelProto:
    """Builds BERT-base with its pooler.

    Args:
        sequence: Number of tokens, at most 512.
        batch: Number of sequences.

    Returns:
        A model from `input_ids`, `attention_mask` and `token_type_ids`, int64 [batch, sequence],
        to `last_hidden_state` [batch, sequence, 768] and `pooler_output` [batch, 768].

    Raises:
        ModelError: The sequence is longer than the table of positions.
    """
    if sequence > _POSITIONS:
        raise ModelError(
            f"bert knows {_POSITIONS} positions, not {sequence}: ask for a shorter sequence"
        )
    net = Net("bert")
    words, mask, types = (
        net.input(name, (batch, sequence), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    x = _embeddings(net, words, types)
    bias = padding_bias(net, "encoder/padding", mask)
    for layer in range(_LAYERS):
        x = _layer(net, f"encoder/layer{layer}", x, bias)
    first = net.op(
        "pooler/first",
        "Gather",
        [x, net.constant("pooler/first/index", 0)],
        (batch, _HIDDEN),
        axis=1,
    )
    pooled = net.elementwise("pooler/tanh", "Tanh", net.gemm("pooler/dense", first, _HIDDEN))
    return net.model(last_hidden_state=x, pooler_output=pooled)


def _embeddings(net: Net, words: gs.Tensor, types: gs.Tensor) -> gs.Variable:
    positions = net.constant("embeddings/position_ids", [list(range(words.shape[1]))])
    parts = []
    for name, rows, count in (
        ("word", words, _WORDS),
        ("token_type", types, _TOKEN_TYPES),
        ("position", positions, _POSITIONS),
    ):
        table = net.normal(f"embeddings/{name}/weight", (count, _HIDDEN), 0.02)
        parts.append(embed(net, f"embeddings/{name}", table, rows))
    word, token_type, position = parts
    x = net.add("embeddings/add_token_type", word, token_type)
    x = net.add("embeddings/add_position", x, position)
    return _layer_norm(net, "embeddings/norm", x)


def _layer(net: Net, name: str, x: gs.Tensor, bias: gs.Tensor) -> gs.Variable:
    block = f"{name}/attention"
    queries = _heads(net, f"{block}/query", x)
    keys = _heads(net, f"{block}/key", x, HEADS_FIRST_TRANSPOSED)
    values = _heads(net, f"{block}/value", x)
    scale = 1 / sqrt(_HIDDEN / _HEADS)
    context = attend(net, block, queries, keys, values, bias, scale)
    context = linear(net, f"{block}/output", context, _HIDDEN)
    x = _layer_norm(net, f"{block}/norm", net.add(f"{block}/residual", context, x))
    block = f"{name}/feed_forward"
    inner = _gelu(net, f"{block}/gelu", linear(net, f"{block}/inner", x, _INTERMEDIATE))
    outer = linear(net, f"{block}/outer", inner, _HIDDEN)
    return _layer_norm(net, f"{block}/norm", net.add(f"{block}/residual", outer, x))


def _heads(net: Net, name: str, x: gs.Tensor, order: Sequence[int] = HEADS_FIRST) -> gs.Variable:
    return split_heads(net, name, linear(net, name, x, _HIDDEN), _HEADS, order)


def _layer_norm(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    weight = net.uniform(f"{name}/weight", (_HIDDEN,), 0.75, 1.25)
    bias = net.normal(f"{name}/bias", (_HIDDEN,), 0.1)
    operands = [x, weight, bias]
    return net.op(name, "LayerNormalization", operands, x.shape, axis=-1, epsilon=1e-12)


def _gelu(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    """The exact Gelu: x / 2 * (1 + erf(x / sqrt(2)))."""
    y = net.elementwise(f"{name}/div", "Div", x, sqrt(2))
    y = net.elementwise(f"{name}/erf", "Erf", y)
    y = net.elementwise(f"{name}/add", "Add", y, 1.0)
    y = net.elementwise(f"{name}/mul", "Mul", x, y)
    return net.elementwise(f"{name}/half", "Mul", y, 0.5)
