"""DeepFM: Guo et al. 2017, "DeepFM: A Factorization-Machine based Neural Network".

Of the size that click-through models have on the Criteo data: each categorical feature looks
its embedding up in a table of its own, each numeric one scales its own embedding.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import RELU_GAIN, Net

_CATEGORICAL = 32
_NUMERIC = 16
_VOCABULARY = 1000
_EMBEDDING = 8
_HIDDEN = (256, 128)


def deepfm(batch: int) -> onnx.ModelProto:
    """Builds DeepFM.

    Args:
        batch: Number of samples.

    Returns:
        A model from `categorical`, int64 [batch, 32] with values below 1000, and `numeric`
        [batch, 16] to `probability` [batch, 1].
    """
    net = Net("deepfm")
    categorical = net.input("categorical", (batch, _CATEGORICAL), np.int64)
    numeric = net.input("numeric", (batch, _NUMERIC))
    columns = [_column(net, categorical, index) for index in range(_CATEGORICAL)]
    fields = _fields(net, columns, numeric)
    logit = net.add("order", _first_order(net, columns, numeric), _second_order(net, fields))
    logit = net.add("logit", logit, _deep(net, fields))
    return net.model(probability=net.elementwise("sigmoid", "Sigmoid", logit))


def _column(net: Net, categorical: gs.Tensor, index: int) -> gs.Variable:
    name = f"categorical{index}"
    which = net.constant(f"{name}/index", [index])
    return net.op(name, "Gather", [categorical, which], (categorical.shape[0], 1), axis=1)


def _lookups(net: Net, name: str, columns: list[gs.Variable], width: int) -> list[gs.Variable]:
    """Looks each column up in its own table: one [batch, 1, width] a column."""
    found = []
    for index, rows in enumerate(columns):
        node = f"{name}/categorical{index}"
        table = net.normal(f"{node}/weight", (_VOCABULARY, width), 0.1)
        found.append(net.op(node, "Gather", [table, rows], (*rows.shape, width), axis=0))
    return found


def _fields(net: Net, columns: list[gs.Variable], numeric: gs.Tensor) -> gs.Variable:
    """Embeds every feature: [batch, 48, 8]."""
    batch = numeric.shape[0]
    axes = net.constant("embedding/numeric/unsqueeze/axes", [2])
    scales = net.op(
        "embedding/numeric/unsqueeze", "Unsqueeze", [numeric, axes], (batch, _NUMERIC, 1)
    )
    vectors = net.normal("embedding/numeric/weight", (_NUMERIC, _EMBEDDING), 0.1)
    scaled = net.elementwise("embedding/numeric/mul", "Mul", scales, vectors)
    return net.concat(
        "embedding/concat", [*_lookups(net, "embedding", columns, _EMBEDDING), scaled]
    )


def _first_order(net: Net, columns: list[gs.Variable], numeric: gs.Tensor) -> gs.Variable:
    weights = net.concat("linear/concat", _lookups(net, "linear", columns, 1))
    total = _sum(net, "linear/sum", weights, 1)
    return net.add("linear/add", total, net.gemm("linear/numeric", numeric, 1))


def _second_order(net: Net, fields: gs.Tensor) -> gs.Variable:
    """Sums the products of all pairs: half of (the square of the sum - the sum of squares)."""
    total = _sum(net, "fm/sum", fields, 1)
    square_of_sum = net.elementwise("fm/square_of_sum", "Mul", total, total)
    squares = net.elementwise("fm/squares", "Mul", fields, fields)
    difference = net.elementwise(
        "fm/difference", "Sub", square_of_sum, _sum(net, "fm/sum_of_squares", squares, 1)
    )
    pairs = _sum(net, "fm/pairs", difference, 1, keepdims=1)
    return net.elementwise("fm/half", "Mul", pairs, 0.5)


def _deep(net: Net, fields: gs.Tensor) -> gs.Variable:
    batch, count, width = fields.shape
    x = net.op("deep/flatten", "Flatten", [fields], (batch, count * width), axis=1)
    for index, features in enumerate(_HIDDEN, start=1):
        x = net.gemm(f"deep/layer{index}/gemm", x, features, RELU_GAIN)
        x = net.relu(f"deep/layer{index}/relu", x)
    return net.gemm("deep/output", x, 1)


def _sum(net: Net, name: str, x: gs.Tensor, axis: int, keepdims: int = 0) -> gs.Variable:
    shape = list(x.shape)
    shape[axis : axis + 1] = [1] * keepdims
    axes = net.constant(f"{name}/axes", [axis])
    return net.op(name, "ReduceSum", [x, axes], shape, keepdims=keepdims)
