"""RMS norms (Zhang and Sennrich 2019) as one operator each, with the residual sum before them."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute
from onnxsched_runtime.model import is_standard, renamed

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization")
"""ONNX Runtime's own, which it registers among the standard operators; and that of opset 23."""

_SKIP = "SkipSimplifiedLayerNormalization"


def rms_norm(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """`x / sqrt(mean(x * x) + epsilon) * weight` is a SimplifiedLayerNormalization.

    The mean is over the last axis. Exporters write the division as one, or as a product with the
    reciprocal or with `1 / sqrt`.
    """
    if not is_standard(node, "Mul"):
        return None
    for scaled, weight in _orders(node):
        found = _normalized(index, scaled) if weight in index.weights else None
        if found is None:
            continue
        nodes, x, epsilon = found
        if not _is_weight_of(index, weight, x) or index.shape(node.output[0]) != index.shape(x):
            return None
        fused = helper.make_node(
            "SimplifiedLayerNormalization",
            [x, weight],
            list(node.output),
            node.name,
            axis=-1,
            epsilon=epsilon,
            stash_type=TensorProto.FLOAT,
        )
        return Replacement((*nodes, node), (fused,))
    return None


def skip_norm(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """The sum of two tensors and its RMS norm are a SkipSimplifiedLayerNormalization.

    It writes the sum as well where something else reads it.
    """
    if not is_standard(node, *_NORMS) or not _is_over_last_axis(index, node):
        return None
    total, weight = node.input
    before = index.writer(total, "Add")
    if before is None or not _is_weight_of(index, weight, total):
        return None
    shape = index.shape(total)
    if shape is None or len(shape) not in (2, 3):
        return None
    if any(index.tensors.get(part) != index.tensors[total] for part in before.input):
        return None
    outputs = [node.output[0]]
    if total in index.outputs or len(index.readers[total]) > 1:
        outputs += ["", "", total]
    fused = helper.make_node(
        _SKIP,
        [*before.input, weight],
        outputs,
        node.name,
        domain="com.microsoft",
        epsilon=attribute(node, "epsilon", 1e-5),
    )
    return Replacement((before, node), (fused,))


def scaled_norm(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A number that a norm is multiplied by, as before T5's head, goes into its weight."""
    if not is_standard(node, "Mul"):
        return None
    for tensor, factor in _orders(node):
        norm, value = index.writers.get(tensor), index.constant(factor)
        if norm is None or value is None or value.size != 1 or index.sole_reader(tensor) is None:
            continue
        if norm.op_type not in (*_NORMS, _SKIP) or norm.output[0] != tensor:
            continue
        old = norm.input[2 if norm.op_type == _SKIP else 1]
        if old not in index.weights or index.shape(node.output[0]) != index.shape(tensor):
            continue
        weight, name = numpy_helper.to_array(index.weights[old]), index.unused(f"{tensor}/weight")
        scaled = numpy_helper.from_array((weight * value.item()).astype(weight.dtype), name)
        fused = renamed(norm, {old: name})
        fused.output[0] = node.output[0]
        return Replacement((norm, node), (fused,), (scaled,))
    return None


def _normalized(
    index: GraphIndex, tensor: str
) -> tuple[tuple[onnx.NodeProto, ...], str, float] | None:
    """The nodes that divide a tensor by its root mean square, the tensor, and epsilon."""
    product = index.sole_writer(tensor, "Mul", "Div")
    if product is None:
        return None
    for x, divisor in _orders(product):
        nodes = [product]
        root = divisor
        if product.op_type == "Mul":
            inverse = index.sole_writer(divisor, "Reciprocal", "Div")
            if inverse is None or not _is_reciprocal(index, inverse):
                continue
            nodes.append(inverse)
            root = inverse.input[-1]
        found = _mean_square(index, root, x)
        if found is not None:
            return (*found[0], *nodes), x, found[1]
    return None


def _mean_square(
    index: GraphIndex, root: str, x: str
) -> tuple[tuple[onnx.NodeProto, ...], float] | None:
    """The nodes from a tensor to its root mean square, and epsilon."""
    sqrt = index.sole_writer(root, "Sqrt")
    total = None if sqrt is None else index.sole_writer(sqrt.input[0], "Add")
    if sqrt is None or total is None:
        return None
    for part, constant in _orders(total):
        epsilon = index.constant(constant)
        mean = index.sole_writer(part, "ReduceMean")
        if mean is None or epsilon is None or epsilon.size != 1 or not _keeps_axis(index, mean):
            continue
        square = index.sole_writer(mean.input[0], "Pow", "Mul")
        if square is not None and _is_square(index, square, x):
            return (square, mean, total, sqrt), epsilon.item()
    return None


def _orders(node: onnx.NodeProto) -> list[tuple[str, str]]:
    """The two inputs of a node, in both orders where it makes no difference."""
    left, right = node.input
    return [(left, right)] if node.op_type == "Div" else [(left, right), (right, left)]


def _is_reciprocal(index: GraphIndex, node: onnx.NodeProto) -> bool:
    return node.op_type == "Reciprocal" or index.is_scalar(node.input[0], 1)


def _is_square(index: GraphIndex, node: onnx.NodeProto, x: str) -> bool:
    if node.op_type == "Pow":
        return node.input[0] == x and index.is_scalar(node.input[1], 2)
    return list(node.input) == [x, x]


def _keeps_axis(index: GraphIndex, mean: onnx.NodeProto) -> bool:
    """Whether a mean is over the last axis alone, which stays with size 1."""
    axes = attribute(mean, "axes", [])
    if len(mean.input) > 1:
        found = index.constant(mean.input[1])
        axes = [] if found is None else found.ravel().tolist()
    shape = index.shape(mean.input[0])
    last = (-1,) if shape is None else (-1, len(shape) - 1)
    return len(axes) == 1 and axes[0] in last and attribute(mean, "keepdims", 1) == 1


def _is_weight_of(index: GraphIndex, weight: str, x: str) -> bool:
    """Whether a stored weight scales the last axis of a float tensor, one number per element."""
    kind, stored = index.tensors.get(x), index.weights.get(weight)
    if kind is None or not kind.shape or stored is None or kind.element_type not in _FLOATS:
        return False
    return stored.data_type == kind.element_type and tuple(stored.dims) == kind.shape[-1:]


def _is_over_last_axis(index: GraphIndex, norm: onnx.NodeProto) -> bool:
    """Whether a norm is over the last axis, computes in float32 and writes nothing else."""
    shape = index.shape(norm.input[0])
    axis = attribute(norm, "axis", -1)
    last = shape is not None and axis in (-1, len(shape) - 1)
    in_float = attribute(norm, "stash_type", TensorProto.FLOAT) == TensorProto.FLOAT
    return last and in_float and not any(norm.output[1:])
