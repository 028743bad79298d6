"""Products whose stored matrix lies transposed, as the fastest kernels want it.

Tensor cores of NVIDIA's Hopper read both factors of a product along the dimension that is
summed over; factors of 16 bits may lie the other way, those of TF32 may not (PTX ISA, "wgmma"). A
MatMul's second factor does, so that only kernels of earlier GPUs are left to cuBLAS. What is
stored can just as well be stored transposed. With a single row, each number of the result is then
the product of two rows, which need not be summed up over blocks of threads.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from onnxsched.drafting import Draft, assembled
from onnxsched.graph_view import GraphView, kind_of
from onnxsched.loading import Model
from onnxsched.simplification.replacing import with_attributes
from onnxsched_runtime.model import attributes_of

_PRODUCTS = {("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")}


def find_products(view: GraphView) -> list[onnx.NodeProto]:
    """The products of a model whose stored matrix can lie transposed, in its order.

    Not those whose first factor is transposed itself. O(nodes).
    """
    return [node for node in view.model.proto.graph.node if _is_fitting(view, node)]


def transposed(model: Model) -> Model:
    """The model with its stored matrices transposed; equal but for how sums are rounded.

    O(nodes and bytes of weights).
    """
    draft = Draft(GraphView(model))
    for node in find_products(draft.view):
        draft.changed[node.name] = _with_transposed(draft, node)
    return assembled(draft, model.rewrite)


def _is_fitting(view: GraphView, node: onnx.NodeProto) -> bool:
    if kind_of(node) not in _PRODUCTS:
        return False
    weight, attributes = view.weights.get(node.input[1]), attributes_of(node)
    if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
        return False
    if attributes.get("transA") or attributes.get("transB"):
        return False
    if view.only_reader(node.input[1]) is None:
        return False
    if node.input[0] in view.weights or node.input[1] in node.input[2:]:
        return False
    kind = view.model.tensors.get(node.output[0])
    return kind is not None and len(kind.shape or ()) >= 2


def _with_transposed(draft: Draft, node: onnx.NodeProto) -> onnx.NodeProto:
    name = node.input[1]
    turned = with_attributes(node, transB=1)
    turned.input[1] = draft.store(f"{name}/transposed", draft.view.array(name).T)
    if node.op_type == "MatMul":
        turned.op_type, turned.domain = "FusedMatMul", "com.microsoft"
    return turned
