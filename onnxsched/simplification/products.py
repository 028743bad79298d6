"""Products of transposed tensors: ONNX Runtime's FusedMatMul reads them as they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnxsched.simplification.replacing import GraphIndex, Replacement, attribute
from onnxsched.simplification.views import reshape
from onnxsched_runtime.model import is_standard
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.views import VIEWS, permutation

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


def product_as_columns(index: GraphIndex, node: onnx.NodeProto) -> Replacement | None:
    """No Transpose merges the heads of attention: what they write is computed transposed.

    For each head, context is probabilities times values, [rows, columns]. Its transpose is values
    transposed times probabilities transposed, and those of all heads lie as the rows of one
    matrix, which the product with the output's weights reads as columns.
    """
    weight = index.weights.get(node.input[1]) if is_standard(node, "MatMul") else None
    result = index.tensors.get(node.output[0])
    if weight is None or len(weight.dims) != 2 or result is None or not result.shape:
        return None
    product, between = _product_before(index, node.input[0])
    shape = index.shape(product.output[0]) if product is not None else None
    if product is None or shape is None or len(shape) != 3 or 0 in result.shape:
        return None
    batch, rows, columns = shape
    lies = _through(index, between, np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
    merged = np.arange(lies.size).reshape(shape).swapaxes(0, 1)
    if lies.shape[-1] != batch * columns or (lies.ravel() != merged.ravel()).any():
        return None
    kind = result.element_type
    names = [index.unused(f"{node.output[0]}/{end}") for end in ("heads", "columns", "product")]
    shapes = ((batch, columns, rows), (batch * columns, rows), (rows, weight.dims[1]))
    tensors = {name: TensorType(kind, tuple(s)) for name, s in zip(names, shapes, strict=True)}
    new = [
        _transposed(product, names[0]),
        _fused_node([names[1], node.input[1]], names[2], node.name, transA=1),
    ]
    views = [
        reshape(index, names[0], names[1], shapes[1]),
        reshape(index, names[2], node.output[0], result.shape),
    ]
    return Replacement(
        (*between, product, node),
        (*new, *(view for view, _ in views)),
        tuple(constant for _, constant in views),
        tensors,
    )


def _product_before(
    index: GraphIndex, tensor: str
) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
    """The FusedMatMul that writes a tensor, and what moves its elements after it, last first."""
    between: list[onnx.NodeProto] = []
    while (writer := index.sole_writer(tensor, *VIEWS, "Transpose")) is not None:
        between.append(writer)
        tensor = writer.input[0]
    product = index.writers.get(tensor) if index.sole_reader(tensor) is not None else None
    is_moved = any(node.op_type == "Transpose" for node in between)
    if product is None or product.op_type != "FusedMatMul" or not is_moved:
        return None, []
    return product, between


def _through(
    index: GraphIndex, between: list[onnx.NodeProto], elements: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    for node in reversed(between):
        if node.op_type == "Transpose":
            elements = elements.transpose(permutation(node, elements.ndim))
        else:
            elements = elements.reshape(index.shape(node.output[0]) or ())
    return elements


def _transposed(product: onnx.NodeProto, result: str) -> onnx.NodeProto:
    """The product whose result is transposed: of both sides transposed, in the other order."""
    flags = {}
    for side, other in (("A", "B"), ("B", "A")):
        flags[f"trans{side}"] = 1 - attribute(product, f"trans{other}", 0)
        flags[f"transBatch{side}"] = attribute(product, f"transBatch{other}", 0)
    alpha = attribute(product, "alpha", 1.0)
    return _fused_node(list(reversed(product.input)), result, product.name, alpha=alpha, **flags)


def _fused_node(inputs: list[str], result: str, name: str, **flags: float) -> onnx.NodeProto:
    node = helper.make_node("FusedMatMul", inputs, [result], name, domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(flag, value) for flag, value in flags.items())
    return node


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
