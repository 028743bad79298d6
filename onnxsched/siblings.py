"""Siblings: operators that read one tensor and that one operator with all their weights replaces.

Convolutions of one kernel, products with a stored matrix: what IOS (Ding et al., MLSys 2021)
merges, and what makes one product of the queries, keys and values of attention.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from onnxsched.graph_view import CONVOLUTIONS, GraphView, is_elementwise, kind_of
from onnxsched_runtime.annotation import attribute_digests
from onnxsched_runtime.model import attributes_of

_PRODUCTS = {
    ("", "MatMul"), ("", "Gemm"),
    ("com.microsoft", "FusedGemm"), ("com.microsoft", "FusedMatMul"),
}  # fmt: skip
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
_WINDOW = {"kernel_shape", "strides", "pads", "dilations", "group"}
"""Attributes that may be left out, or differ where kernels are padded."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a convolution reads for one point: one entry for each axis of the image."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    """Padding before the image."""
    ends: tuple[int, ...]
    """Padding behind it."""

    @property
    def padded_key(self) -> Hashable:
        """Equal where zeros around the smaller kernels make them one size.

        A kernel may grow by one wherever its padding grows by its dilation.
        """
        rows = zip(self.kernel, self.dilations, self.begins, self.ends, strict=True)
        spans = tuple(((size - 1) * d - b - e, b % d) for size, d, b, e in rows)
        return (spans, self.strides, self.dilations)


@dataclass(frozen=True)
class Sibling:
    """An operator that can be one of several in a merged one."""

    node: onnx.NodeProto
    channel_count: int
    """What it adds to the merged operator's output."""
    window: Window | None = None
    """Of a convolution, whose channels are the second axis of its output; else the last."""

    @property
    def weight_axis(self) -> int:
        """The axis of its weight that makes output channels."""
        return 0 if self.window or attributes_of(self.node).get("transB") else 1

    @property
    def bias(self) -> str:
        """The weight that it adds; empty where it adds none."""
        return str(self.node.input[2]) if len(self.node.input) > 2 else ""


def find_siblings(
    view: GraphView, *, is_inner: bool = False, is_padded: bool = False
) -> list[tuple[Sibling, ...]]:
    """Groups of two and more siblings, in the order of the model.

    Nothing but stored weights flows into a sibling beside the tensor that all read, so merging
    makes no cycle. O(nodes and edges).

    Args:
        view: The model.
        is_inner: Leave convolutions alone that end a branch: those that go into a Concat.
        is_padded: Also group convolutions whose kernels differ, where zeros around the smaller
            ones make them one size.
    """
    groups: dict[Hashable, list[Sibling]] = {}
    for node in view.model.proto.graph.node:
        sibling = _sibling(view, node)
        if sibling is None or (is_inner and sibling.window and concat_after(view, node)):
            continue
        groups.setdefault(_key(view, sibling, is_padded), []).append(sibling)
    return [_in_order_of_concat(view, group) for group in groups.values() if len(group) > 1]


def _sibling(view: GraphView, node: onnx.NodeProto) -> Sibling | None:
    """The node as a sibling; None where it can't be merged whatever is beside it."""
    kind = kind_of(node)
    if kind not in CONVOLUTIONS | _PRODUCTS or not 2 <= len(node.input) <= 3:
        return None
    weight, output = view.weights.get(node.input[1]), view.model.tensors.get(node.output[0])
    if weight is None or weight.data_type not in _FLOATS or node.input[0] in view.weights:
        return None
    if output is None or not output.shape:
        return None
    if kind in _PRODUCTS:
        sibling = Sibling(node, output.shape[-1])
        is_plain = len(weight.dims) == 2
    else:
        sibling = Sibling(node, output.shape[1], window_of(node, weight.dims[2:]))
        is_plain = attributes_of(node).get("group", 1) == 1
    return sibling if is_plain and _is_bias_of_channels(view, sibling, weight) else None


def window_of(node: onnx.NodeProto, kernel: Sequence[int]) -> Window:
    """What a convolution or pool reads, given the size of its kernel; `auto_pad` is not seen."""
    attributes, ones = attributes_of(node), (1,) * len(kernel)
    pads = tuple(attributes.get("pads", (0, 0) * len(kernel)))
    strides, dilations = (tuple(attributes.get(name, ones)) for name in ("strides", "dilations"))
    return Window(tuple(kernel), strides, dilations, pads[: len(kernel)], pads[len(kernel) :])


def _is_bias_of_channels(view: GraphView, sibling: Sibling, weight: onnx.TensorProto) -> bool:
    """Whether what it adds, if anything, is stored and has one number a channel."""
    if not sibling.bias:
        return True
    bias = view.weights.get(sibling.bias)
    shapes = ([sibling.channel_count], [1, sibling.channel_count])
    return bias is not None and bias.data_type == weight.data_type and list(bias.dims) in shapes


def _key(view: GraphView, sibling: Sibling, is_padded: bool) -> Hashable:
    """Equal for operators that can be one."""
    node, window = sibling.node, sibling.window
    dtype = view.weights[node.input[1]].data_type
    place: Hashable = window
    if window and is_padded and attributes_of(node).get("auto_pad", b"NOTSET") == b"NOTSET":
        place = window.padded_key
    rest = [a for a in node.attribute if window is None or a.name not in _WINDOW]
    attributes = tuple(attribute_digests(onnx.NodeProto(attribute=rest)))
    return (kind_of(node), _source(view, node.input[0]), dtype, place, attributes)


def _source(view: GraphView, tensor: str) -> Hashable:
    """Equal for tensors that are the same: ORT's fusions reshape one once for each product."""
    node = view.writer.get(tensor)
    if node is None or kind_of(node) != ("", "Reshape") or node.input[1] not in view.weights:
        return tensor
    return (node.input[0], tuple(view.array(node.input[1])), tuple(attribute_digests(node)))


def concat_after(view: GraphView, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Concat that reads a sibling's result as it is or after elementwise operators."""
    tensor = end_of_branch(view, node)
    reader = view.only_reader(tensor)
    return reader if reader is not None and kind_of(reader) == ("", "Concat") else None


def end_of_branch(view: GraphView, node: onnx.NodeProto) -> str:
    """What elementwise operators after a node that nothing else reads make of its result."""
    tensor: str = node.output[0]
    while (reader := view.only_reader(tensor)) is not None and is_elementwise(view, reader):
        tensor = reader.output[0]
    return tensor


def _in_order_of_concat(view: GraphView, group: Sequence[Sibling]) -> tuple[Sibling, ...]:
    """As one Concat joins them, which then needs no pieces."""
    concats = [concat_after(view, sibling.node) for sibling in group]
    first = concats[0]
    if first is None or any(concat is None or concat.name != first.name for concat in concats):
        return tuple(group)
    position = {name: number for number, name in enumerate(first.input)}
    return tuple(sorted(group, key=lambda s: position[end_of_branch(view, s.node)]))
