"""Products of transposed tensors: ONNX Runtime's FusedMatMul reads them as they lie."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute, is_standard
from onnxsched.simplification.views import permutation, reshape
from onnxsched_runtime.tensor import TensorType

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_SIDES = ("A", "B")
_FLAGS = {(0, 1, 2): (0, 0), (0, 2, 1): (0, 1), (1, 0, 2): (1, 0), (1, 2, 0): (1, 1)}
"""FusedMatMul's flags `transBatch` and `trans`, for where the axes [batch, rows, columns] lie."""


@dataclass(frozen=True)
class _Operand:
    """What a product reads as one of its sides."""

    tensor: str
    shape: tuple[int, ...]
    """Its shape without the leading dimensions of size 1: three dimensions."""
    trans_batch: int = 0
    """Whether the batch is the second dimension instead of the first."""
    trans: int = 0
    """Whether, but for the batch, columns come before rows."""


def product_of_transposed(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """A product takes in the Transposes before it, as those that split attention into heads.

    That works where all but one of the batch dimensions have size 1, which Reshapes then drop.
    """
    result = index.tensors.get(node.output[0]) if is_product(node) else None
    if result is None or not result.shape or result.element_type not in _FLOATS:
        return None
    sides = [_plain(index, node, side) for side in range(2)]
    left, right = sides
    if left is None or right is None or left.shape[0] != right.shape[0] or 0 in result.shape:
        return None
    operands = [_as_it_lies(index, side) for side in (left, right)]
    gone = [index.writers[side.tensor] for side, read in zip((left, right), operands, strict=True)
            if read != side]  # fmt: skip
    return _fused(index, node, operands, gone, result) if gone else None


def is_product(node: onnx.NodeProto) -> bool:
    """Whether a node multiplies matrices, of which the second may lie transposed."""
    if node.op_type == "FusedMatMul":
        return not any(attribute(node, f"transBatch{side}", 0) for side in _SIDES)
    return is_standard(node, "MatMul")


def _plain(index: GraphIndex, node: onnx.NodeProto, side: int) -> _Operand | None:
    """A side as the node reads it; None if it has more than one batch dimension, or none."""
    shape = index.shape(node.input[side])
    if shape is None or len(shape) < 3 or set(shape[:-3]) - {1}:
        return None
    trans = attribute(node, f"trans{_SIDES[side]}", 0)
    return _Operand(node.input[side], shape[-3:], trans=trans)


def _as_it_lies(index: GraphIndex, operand: _Operand) -> _Operand:
    """A side as it is before its Transpose; the same where that can't be taken in."""
    transpose = index.sole_writer(operand.tensor, "Transpose")
    shape = None if transpose is None else index.shape(transpose.input[0])
    if transpose is None or shape is None:
        return operand
    axes = permutation(transpose, len(shape))[-3:]
    batch, rows, columns = (sorted(axes).index(axis) for axis in axes)
    order = (batch, columns, rows) if operand.trans else (batch, rows, columns)
    if order not in _FLAGS:
        return operand
    return _Operand(transpose.input[0], tuple(shape[a] for a in sorted(axes)), *_FLAGS[order])


def _fused(
    index: GraphIndex,
    node: onnx.NodeProto,
    operands: list[_Operand],
    gone: list[onnx.NodeProto],
    result: TensorType,
) -> Replacement:
    """The product of operands as they lie, between Reshapes where there are more dimensions."""
    views: list[tuple[onnx.NodeProto, TensorProto]] = []
    tensors: dict[str, TensorType] = {}
    shape = result.shape or ()
    product = helper.make_node(
        "FusedMatMul",
        [],
        list(node.output),
        node.name,
        domain="com.microsoft",
        alpha=attribute(node, "alpha", 1.0),
    )
    for side, read in zip(_SIDES, operands, strict=True):
        flags = {f"transBatch{side}": read.trans_batch, f"trans{side}": read.trans}
        product.attribute.extend(helper.make_attribute(*flag) for flag in flags.items())
        product.input.append(read.tensor)
        if index.shape(read.tensor) != read.shape:
            product.input[-1] = index.unused(f"{node.output[0]}/{side}")
            tensors[product.input[-1]] = TensorType(result.element_type, read.shape)
            views.append(reshape(index, read.tensor, product.input[-1], read.shape))
    if len(shape) > 3:
        product.output[0] = index.unused(f"{node.output[0]}/product")
        tensors[product.output[0]] = TensorType(result.element_type, shape[-3:])
        views.append(reshape(index, product.output[0], node.output[0], shape))
    nodes = (*(view for view, _ in views), product)
    return Replacement((*gone, node), nodes, tuple(weight for _, weight in views), tensors)
