"""T5-small: Raffel et al. 2019, "Exploring the Limits of Transfer Learning".

The encoder, and one step of the decoder over caches of keys and values.
"""

from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from sample_models.errors import ModelError
from sample_models.layers import Net
from sample_models.transformer import (
    HEADS_FIRST_TRANSPOSED,
    attend,
    embed,
    linear,
    padding_bias,
    reshape,
    split_heads,
    transpose,
)

_LAYERS = 6
_HEADS = 8
_HIDDEN = 512
_HEAD = 64
_FEED_FORWARD = 2048
_WORDS = 32128
_BUCKETS = 32
_FAR = 128
_LONGEST = 4096
_KINDS = ("self", "cross")


@dataclass(frozen=True)
class _Cache:
    """Keys and values [batch, 8, positions, 64] of one attention."""

    keys: gs.Tensor
    values: gs.Tensor


def t5_encoder(sequence: int, batch: int) -> onnx.ModelProto:
    """Builds the encoder of T5-small.

    Args:
        sequence: Number of tokens.
        batch: Number of sequences.

    Returns:
        A model from `input_ids` and `attention_mask`, int64 [batch, sequence], to
        `last_hidden_state` [batch, sequence, 512].

    Raises:
        ModelError: The table of relative positions, which grows with the square of the
            sequence, would be too large.
    """
    if sequence > _LONGEST:
        raise ModelError(
            f"sequence is {sequence} for t5_encoder: ask for {_LONGEST} or less, since the model "
            "holds a table of its square"
        )
    net = Net("t5_encoder")
    words = net.input("input_ids", (batch, sequence), np.int64)
    mask = net.input("attention_mask", (batch, sequence), np.int64)
    x = embed(net, "shared", net.normal("shared/weight", (_WORDS, _HIDDEN), 1.0), words)
    bias = net.add(
        "encoder/bias", _position_bias(net, sequence), padding_bias(net, "encoder/padding", mask)
    )
    for layer in range(_LAYERS):
        x = _encoder_attention(net, f"encoder/block{layer}/self_attention", x, bias)
        x = _feed_forward(net, f"encoder/block{layer}/feed_forward", x)
    return net.model(last_hidden_state=_rms_norm(net, "encoder/norm", x))


def t5_decoder(sequence: int, batch: int) -> onnx.ModelProto:
    """Builds one step of the decoder of T5-small, with the head that shares the embedding.

    Args:
        sequence: Number of tokens decoded before, and of tokens that the encoder saw.
        batch: Number of sequences.

    Returns:
        A model from `input_ids`, int64 [batch, 1], and for each layer N
        `past.N.self.key`, `past.N.self.value`, `past.N.cross.key`, `past.N.cross.value`
        [batch, 8, sequence, 64], to `logits` [batch, 1, 32128] and for each layer
        `present.N.self.key`, `present.N.self.value` [batch, 8, sequence + 1, 64].
    """
    net = Net("t5_decoder")
    words = net.input("input_ids", (batch, 1), np.int64)
    past = [
        {kind: _cache_input(net, f"past.{layer}.{kind}", batch, sequence) for kind in _KINDS}
        for layer in range(_LAYERS)
    ]
    shared = net.normal("shared/weight", (_WORDS, _HIDDEN), 1.0)
    bias = _folded_position_bias(net, sequence)
    present = {}
    x = embed(net, "shared", shared, words)
    for layer, caches in enumerate(past):
        block = f"decoder/block{layer}"
        x, cache = _self_attention(net, f"{block}/self_attention", x, caches["self"], bias)
        x = _cross_attention(net, f"{block}/cross_attention", x, caches["cross"])
        x = _feed_forward(net, f"{block}/feed_forward", x)
        present[f"present.{layer}.self.key"] = cache.keys
        present[f"present.{layer}.self.value"] = cache.values
    return net.model(logits=_head(net, x, shared), **present)


def _cache_input(net: Net, name: str, batch: int, positions: int) -> _Cache:
    shape = (batch, _HEADS, positions, _HEAD)
    return _Cache(net.input(f"{name}.key", shape), net.input(f"{name}.value", shape))


def _encoder_attention(net: Net, name: str, x: gs.Tensor, bias: gs.Tensor) -> gs.Variable:
    normed = _rms_norm(net, f"{name}/norm", x)
    queries = _queries(net, name, normed)
    keys = _project(net, f"{name}/key", normed)
    keys = split_heads(net, f"{name}/key", keys, _HEADS, HEADS_FIRST_TRANSPOSED)
    values = split_heads(net, f"{name}/value", _project(net, f"{name}/value", normed), _HEADS)
    context = attend(net, name, queries, keys, values, bias)
    return net.add(f"{name}/residual", x, _project(net, f"{name}/output", context))


def _self_attention(
    net: Net, name: str, x: gs.Tensor, past: _Cache, bias: gs.Tensor
) -> tuple[gs.Variable, _Cache]:
    normed = _rms_norm(net, f"{name}/norm", x)
    queries = _queries(net, name, normed)
    both = []
    for role, before in (("key", past.keys), ("value", past.values)):
        now = _project(net, f"{name}/{role}", normed)
        now = split_heads(net, f"{name}/{role}", now, _HEADS)
        both.append(net.concat(f"{name}/{role}/concat", [before, now], axis=2))
    present = _Cache(*both)
    context = _attend_cache(net, name, queries, present, bias)
    return net.add(f"{name}/residual", x, _project(net, f"{name}/output", context)), present


def _cross_attention(net: Net, name: str, x: gs.Tensor, encoded: _Cache) -> gs.Variable:
    """Attends to what the encoder put out, which is neither masked nor biased."""
    queries = _queries(net, name, _rms_norm(net, f"{name}/norm", x))
    context = _attend_cache(net, name, queries, encoded, None)
    return net.add(f"{name}/residual", x, _project(net, f"{name}/output", context))


def _attend_cache(
    net: Net, name: str, queries: gs.Tensor, cache: _Cache, bias: gs.Tensor | None
) -> gs.Variable:
    keys = transpose(net, f"{name}/key/flip", cache.keys, (0, 1, 3, 2))
    return attend(net, name, queries, keys, cache.values, bias)


def _feed_forward(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    inner = _rms_norm(net, f"{name}/norm", x)
    inner = linear(net, f"{name}/inner", inner, _FEED_FORWARD, bias=False)
    inner = net.relu(f"{name}/relu", inner)
    return net.add(f"{name}/residual", x, linear(net, f"{name}/outer", inner, _HIDDEN, bias=False))


def _head(net: Net, x: gs.Tensor, shared: gs.Constant) -> gs.Variable:
    """Multiplies by the embedding, scaled down as in T5 wherever the two are tied."""
    batch = x.shape[0]
    x = _rms_norm(net, "decoder/norm", x)
    x = net.elementwise("head/scale", "Mul", x, 1 / sqrt(_HIDDEN))
    x = reshape(net, "head/flatten", x, (batch, _HIDDEN))
    x = net.op("head/gemm", "Gemm", [x, shared], (batch, _WORDS), transB=1)
    return reshape(net, "head/reshape", x, (batch, 1, _WORDS))


def _queries(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    # T5 does not scale the scores: the weights of the queries are that much smaller.
    x = linear(net, f"{name}/query", x, _HIDDEN, bias=False, gain=1 / sqrt(_HEAD))
    return split_heads(net, f"{name}/query", x, _HEADS)


def _project(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    return linear(net, name, x, _HIDDEN, bias=False)


def _rms_norm(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    """Divides by the root of the mean square of the features, and scales."""
    square = net.elementwise(f"{name}/pow", "Pow", x, 2.0)
    mean = net.op(
        f"{name}/mean", "ReduceMean", [square], (*x.shape[:-1], 1), axes=[-1], keepdims=1
    )
    mean = net.elementwise(f"{name}/add", "Add", mean, 1e-6)
    root = net.elementwise(f"{name}/sqrt", "Sqrt", mean)
    factor = net.elementwise(f"{name}/reciprocal", "Reciprocal", root)
    x = net.elementwise(f"{name}/normalize", "Mul", x, factor)
    weight = net.uniform(f"{name}/weight", (_HIDDEN,), 0.75, 1.25)
    return net.elementwise(f"{name}/scale", "Mul", weight, x)


def _bias_table(net: Net, name: str) -> gs.Constant:
    return net.normal(f"{name}/weight", (_BUCKETS, _HEADS), 1.0)


def _position_bias(net: Net, sequence: int) -> gs.Variable:
    """The encoder's bias by relative position: [1, 8, sequence, sequence]."""
    name = "encoder/position_bias"
    here = np.arange(sequence)
    distances = here[:, None] - here[None, :]
    # One half of the buckets is for what comes before, the other for what comes after.
    half = _BUCKETS // 2
    buckets = _buckets(np.abs(distances), half) + half * (distances < 0)
    rows = net.constant(f"{name}/buckets", buckets)
    x = embed(net, f"{name}/gather", _bias_table(net, name), rows)
    x = transpose(net, f"{name}/transpose", x, (2, 0, 1))
    axes = net.constant(f"{name}/unsqueeze/axes", [0])
    return net.op(f"{name}/unsqueeze", "Unsqueeze", [x, axes], (1, *x.shape))


def _folded_position_bias(net: Net, sequence: int) -> gs.Constant:
    """The bias of the decoder's newest position as a constant: [1, 8, 1, sequence + 1]."""
    name = "decoder/position_bias"
    buckets = _buckets(np.arange(sequence, -1, -1), _BUCKETS)
    table = _bias_table(net, name).values
    return net.constant(f"{name}/folded", table[buckets].T[None, :, None, :])


def _buckets(distances: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Puts small distances in a bucket each and larger ones in ever wider buckets."""
    exact = count // 2
    ratios = np.log(np.maximum(distances, exact) / exact) / log(_FAR / exact)
    wide = exact + (ratios * (count - exact)).astype(np.int64)
    return np.where(distances < exact, distances, np.minimum(wide, count - 1))
