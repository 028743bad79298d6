"""Biases of queries that scores have instead: the same results, a shorter way to them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxsched.loading import Model, graph_from_model
from onnxsched.rewriting import possible_detours, rewritten
from onnxsched.scores import biased_scores, find_query_biases
from onnxsched.siblings import GraphView
from onnxsched_runtime.model import name_nodes
from support.models import CPU, feeds_for, reference
from support.optimizing import as_it_is, assert_close, parsed
from support.strategies import GPU

ATTENTION = """
(float[1, 3, 8] x, float[1, 1, 1, 3] mask, float[1, 2, 3, 3] masks)
    => (float[1, 2, 3, 3] y)
    <float[2, 3, 3] heads, int64[3] split = {3, 2, 4}, int64[4] unfold = {1, 2, 3, 3}>
{
    product = MatMul(x, wq)
    queries = Add(product, bias)
    a = Reshape(queries, split)
    keys = MatMul(x, wk)
    b = Reshape(keys, split)
    heads = com.microsoft.FusedMatMul
        <alpha = 0.5, transBatchA = 1, transBatchB = 1, transB = 1>(a, b)
    scores = Reshape(heads, unfold)
    masked = Add(scores, mask)
    y = Softmax<axis = -1>(masked)
}
"""


def attention(*changes: tuple[str, str]) -> Model:
    text = ATTENTION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    model = parsed(text)
    rng = np.random.default_rng(0)
    for name, shape in (("wq", (8, 8)), ("wk", (8, 8)), ("bias", (8,))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    name_nodes(model)
    return as_it_is(model)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (("Add(product, bias)", "Add(bias, product)"),),
        (("Add(scores, mask)", "Add(mask, scores)"),),
        (("alpha = 0.5, ", ""),),
        (("axis = -1", "axis = 3"),),
    ],
    ids=["as it is", "bias first", "mask first", "unscaled", "last axis by number"],
)
def test_scores_have_the_bias_of_queries_instead(changes: tuple[tuple[str, str], ...]) -> None:
    model = attention(*changes)
    assert possible_detours(model, GPU) == ("query-bias",)
    assert possible_detours(model, CPU) == ()
    result = rewritten(model, "query-bias")
    assert result.rewrite == "query-bias"
    assert result.proto == rewritten(model, "query-bias").proto
    feeds = feeds_for(model.proto)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
    onnx.checker.check_model(result.proto)
    assert longest_way(result) == longest_way(model) - 1


def longest_way(model: Model) -> int:
    """How many operators are one after another, from the tokens through the queries."""
    graph = graph_from_model(model)
    names = [operator.name for operator in graph.operators]
    writer = {t: n.name for n in model.proto.graph.node for t in n.output}
    depth: dict[str, int] = {}
    for node in model.proto.graph.node:
        before = [depth[writer[t]] for t in node.input if t in writer]
        depth[node.name] = 1 + max(before, default=0)
    assert set(depth) == set(names)
    return max(depth.values())


@pytest.mark.parametrize(
    "changes",
    [
        (("Add(scores, mask)", "Add(scores, masks)"),),
        (("=> (float[1, 2, 3, 3] y)", "=> (float[1, 2, 3, 3] y, float[1, 3, 8] queries)"),),
        (("keys = MatMul(x, wk)", "keys = Neg(x)"),),
        (("transB = 1>", "transB = 1, transA = 1>"), ("[1, 2, 3, 3] y", "[1, 2, 4, 4] y"),
         ("{1, 2, 3, 3}", "{1, 2, 4, 4}"), ("transBatchB = 1, transB = 1", "transBatchB = 1")),
        (("axis = -1", "axis = 2"),),
        (("y = Softmax<axis = -1>(masked)", "y = Neg(masked)"),),
        (("Add(product, bias)", "Add(product, x)"),),
        (("transB = 1>(a, b)", "transB = 1>(b, a)"),),
    ],
    ids=["a mask for each query", "an output", "keys without weights", "other product",
         "other axis", "no softmax", "nothing stored", "of keys"],
)  # fmt: skip
def test_other_biases_stay(changes: tuple[tuple[str, str], ...]) -> None:
    model = attention(*changes)
    assert find_query_biases(GraphView(model)) == []
    assert [n.name for n in biased_scores(model).proto.graph.node] == [
        n.name for n in model.proto.graph.node
    ]
