"""Biases of queries that are added to the scores of attention, beside the mask.

For queries q + b and keys k, the scores are q k + b k. The second term is the same for all
queries, so it goes where the mask is added, and it needs no keys: with k = x W it is x (W b), a
product with one stored vector a head. That is more work, but beside the longest way: queries no
longer wait for their bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from onnxsched.drafting import Draft, assembled
from onnxsched.loading import Model
from onnxsched.siblings import GraphView, attributes_of, kind_of
from onnxsched.simplification.replacing import with_inputs

_PRODUCT = ("com.microsoft", "FusedMatMul")
_FLAGS = {"transBatchA": 1, "transA": 0, "transBatchB": 1, "transB": 1}
"""Queries and keys are [tokens, heads, channels]."""


@dataclass(frozen=True)
class Attention:
    """The part of an attention that its queries' bias is in."""

    bias: onnx.NodeProto
    """The Add of the bias."""
    split: onnx.NodeProto
    """The Reshape that splits the queries into heads."""
    scores: onnx.NodeProto
    """Their product with the keys."""
    keys: onnx.NodeProto
    """The product of tokens and stored weights that the keys are."""
    masked: onnx.NodeProto
    """The Add of the mask to them."""
    mask: str
    """What that adds."""


def find_query_biases(view: GraphView) -> list[Attention]:
    """Every attention whose queries have a bias that the scores could have. O(nodes)."""
    found = (_attention(view, node) for node in view.model.proto.graph.node)
    return [attention for attention in found if attention is not None]


def biased_scores(model: Model) -> Model:
    """The model with the biases of queries added to scores; equal within rounding.

    O(nodes and bytes of the keys' weights).
    """
    draft = Draft(GraphView(model))
    for attention in find_query_biases(draft.view):
        _move(draft, attention)
    return assembled(draft, model.rewrite)


def _attention(view: GraphView, node: onnx.NodeProto) -> Attention | None:
    """The attention that an Add of a stored bias begins; None where it is another one."""
    if kind_of(node) != ("", "Add") or _stored_vector(view, node) is None:
        return None
    split = _reader(view, node, "Reshape")
    scores = None if split is None else view.only_reader(split.output[0])
    if split is None or scores is None or not _multiplies_heads(view, split, scores):
        return None
    keys, mask = _keys(view, scores), _mask(view, scores)
    return None if keys is None or mask is None else Attention(node, split, scores, keys, *mask)


def _stored_vector(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The bias that an Add adds to the last axis of what it reads; None where it does not."""
    stored = [name for name in node.input if name in view.weights]
    shape = _shape(view, node.output[0])
    if len(stored) != 1 or list(view.weights[stored[0]].dims) != list(shape[-1:]):
        return None
    return str(stored[0])


def _multiplies_heads(view: GraphView, split: onnx.NodeProto, scores: onnx.NodeProto) -> bool:
    """Whether queries, split into heads, are what a product with keys reads first."""
    given = attributes_of(scores)
    flags = {name: given.get(name, 0) for name in _FLAGS}
    if kind_of(scores) != _PRODUCT or flags != _FLAGS or scores.input[0] != split.output[0]:
        return False
    whole, heads = _shape(view, split.input[0]), _shape(view, split.output[0])
    tokens = int(np.prod(whole[:-1]))
    return len(heads) == 3 and heads[0] == tokens and heads[1] * heads[2] == whole[-1]


def _keys(view: GraphView, scores: onnx.NodeProto) -> onnx.NodeProto | None:
    """The product that makes the keys of the tokens; None where they are made otherwise."""
    split = view.writer.get(scores.input[1])
    if split is None or kind_of(split) != ("", "Reshape"):
        return None
    keys = view.writer.get(split.input[0])
    if keys is None or kind_of(keys) != ("", "MatMul") or keys.input[1] not in view.weights:
        return None
    if keys.input[0] in view.weights or len(view.weights[keys.input[1]].dims) != 2:
        return None
    tokens, heads = _shape(view, keys.input[0]), _shape(view, split.output[0])
    channels = view.weights[keys.input[1]].dims[1]
    is_split = len(heads) == 3 and heads[1] * heads[2] == channels
    return keys if is_split and int(np.prod(tokens[:-1])) == heads[0] else None


def _mask(view: GraphView, scores: onnx.NodeProto) -> tuple[onnx.NodeProto, str] | None:
    """What adds a mask that is the same for all queries before a Softmax, and the mask."""
    unfolded = _reader(view, scores, "Reshape")
    masked = None if unfolded is None else _reader(view, unfolded, "Add")
    softmax = None if masked is None else _reader(view, masked, "Softmax")
    if unfolded is None or masked is None or softmax is None:
        return None
    mask = next((name for name in masked.input if name != unfolded.output[0]), "")
    own = list(view.weights[mask].dims) if mask in view.weights else list(_shape(view, mask))
    heads, shape = _shape(view, scores.output[0]), _shape(view, masked.output[0])
    is_unfolded = len(heads) == 3 and tuple(shape) == (1, *heads)
    is_same = bool(own) and (len(own) < 2 or own[-2] == 1)
    is_of_rows = attributes_of(softmax).get("axis", -1) in (-1, 3)
    return (masked, mask) if is_unfolded and is_same and is_of_rows else None


def _reader(view: GraphView, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
    """The only reader of what a node writes, if it is of this type."""
    reader = view.only_reader(node.output[0])
    return reader if reader is not None and kind_of(reader) == ("", op_type) else None


def _shape(view: GraphView, tensor: str) -> Sequence[int]:
    kind = view.model.tensors.get(tensor)
    return () if kind is None or kind.shape is None else kind.shape


def _move(draft: Draft, attention: Attention) -> None:
    """Take the bias from the queries and add what it is worth to the mask."""
    view, scores, masked = draft.view, attention.scores, attention.masked
    stored = _stored_vector(view, attention.bias)
    queries = next(name for name in attention.bias.input if name != stored)
    draft.removed.add(attention.bias.name)
    split = {attention.bias.output[0]: queries}
    draft.changed[attention.split.name] = with_inputs(attention.split, split)
    kind, name = view.model.tensors[scores.output[0]], f"{scores.name}/bias"
    heads, _, tokens = kind.shape or ()
    source = attention.keys.input[0]
    shape = (1, heads, 1, tokens)
    flat_shape = (*_shape(view, source)[:-2], heads, tokens)
    flat = draft.declare(f"{name}/flat", replace(kind, shape=flat_shape))
    term = draft.declare(f"{name}/term", replace(kind, shape=shape))
    total = draft.declare(f"{name}/mask", replace(kind, shape=shape))
    vectors = draft.store(f"{name}/vectors", _vectors(view, attention, heads))
    unfold = draft.store(f"{name}/shape", np.array(shape, np.int64))
    domain, product = _PRODUCT
    draft.added.setdefault(masked.name, []).extend(
        [
            helper.make_node(
                product, [vectors, source], [flat], f"{name}/product", domain=domain, transB=1
            ),
            helper.make_node("Reshape", [flat, unfold], [term], f"{name}/reshape"),
            helper.make_node("Add", [attention.mask, term], [total], f"{name}/add"),
        ]
    )
    draft.changed[masked.name] = with_inputs(masked, {attention.mask: total})


def _vectors(view: GraphView, attention: Attention, heads: int) -> np.ndarray:
    """For each head what a token is multiplied with for its scores: [heads, channels]."""
    weight, bias = view.array(attention.keys.input[1]), _stored_vector(view, attention.bias)
    assert bias is not None
    parts = weight.astype(np.float64).reshape(len(weight), heads, -1)
    values = view.array(bias).astype(np.float64).reshape(heads, -1)
    scale = attributes_of(attention.scores).get("alpha", 1.0)
    vectors: np.ndarray = np.einsum("chd,hd->hc", parts, values) * scale
    return vectors.astype(weight.dtype)
