"""Convolutions of a Concat in two: of the branches that are there early, and of the last one.

A convolution is linear in its channels, so that of a Concat is a sum of convolutions of its parts.
Where one branch comes later than all others, what the next convolution makes of these can be
computed meanwhile, and the kernel of the last part adds it. Then no Concat lies on the longest way
through the model, and the convolution there has fewer channels to sum over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsched.drafting import Draft, assembled, with_size
from onnxsched.loading import Model
from onnxsched.siblings import GraphView, attributes_of, is_dense_convolution, kind_of
from onnxsched.simplification.relus import KEEPS_SIGN
from onnxsched.simplification.replacing import is_standard, renamed
from onnxsched_runtime.fusing import depths, steps_of

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


@dataclass(frozen=True)
class EarlySum:
    """A convolution that waits for one branch of a Concat longer than for the others."""

    concat: onnx.NodeProto
    relu: onnx.NodeProto | None
    """What rectifies all that is joined, if anything does."""
    late: int
    """Which of the Concat's inputs comes last."""
    reader: onnx.NodeProto
    """The convolution, of all readers that with the longest way to the outputs."""


def find_early_sums(view: GraphView) -> list[EarlySum]:
    """Where part of a convolution can be computed while its last input still is.

    Ways are counted in operators that take time of their own. One convolution for each Concat, in
    the model's order. O(nodes and edges).
    """
    nodes = view.model.proto.graph.node
    depth, height = depths(nodes), _heights(view)
    found = (_early_sum(view, node, depth, height) for node in nodes)
    return [place for place in found if place is not None]


def summed(model: Model) -> Model:
    """The model with sums of early and late convolutions; equal but for how sums are rounded.

    O(nodes, edges and bytes of weights).
    """
    draft = Draft(GraphView(model))
    positive = _nowhere_negative(draft.view)
    for place in find_early_sums(draft.view):
        _sum(draft, place, _rectified(draft, place, positive))
    return assembled(draft, model.rewrite)


def _heights(view: GraphView) -> dict[str, int]:
    """How many operators come one after another from each node on, itself included, by name."""
    height: dict[str, int] = {}
    for node in reversed(view.model.proto.graph.node):
        after = (height[n.name] for t in node.output for n in view.readers.get(t, []))
        height[node.name] = steps_of(node) + max(after, default=0)
    return height


def _early_sum(
    view: GraphView, concat: onnx.NodeProto, depth: Mapping[str, int], height: Mapping[str, int]
) -> EarlySum | None:
    """What a Concat joins, as parts of a convolution."""
    if not _joins_channels(view, concat):
        return None
    steps = [depth.get(name, 0) for name in concat.input]
    late = steps.index(max(steps))
    if steps.count(steps[late]) > 1:
        return None
    relu = view.only_reader(concat.output[0])
    if relu is not None and kind_of(relu) != ("", "Relu"):
        relu = None
    result = concat.output[0] if relu is None else relu.output[0]
    readers = view.readers.get(result, [])
    longest = max((height[node.name] for node in readers), default=0)
    for node in readers:
        if height[node.name] == longest and is_dense_convolution(view, node):
            return EarlySum(concat, relu, late, node)
    return None


def _joins_channels(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node joins images of known sizes that flow, side by side."""
    if kind_of(node) != ("", "Concat") or len(node.input) < 2:
        return False
    kinds = [view.model.tensors.get(name) for name in (*node.input, node.output[0])]
    are_images = all(
        kind is not None
        and kind.element_type in _FLOATS
        and len(kind.shape or ()) == 4
        and 0 not in (kind.shape or ())
        for kind in kinds
    )
    is_computed = not any(name in view.weights for name in node.input)
    return are_images and is_computed and attributes_of(node)["axis"] in (1, -3)


def _nowhere_negative(view: GraphView) -> set[str]:
    """The tensors that a Relu would leave as they are, as far as operators tell."""
    found: set[str] = set()
    for node in view.model.proto.graph.node:
        is_kept = is_standard(node, *KEEPS_SIGN) and found.issuperset(node.input)
        if is_kept or is_standard(node, "Relu"):
            found.add(node.output[0])
    return found


def _rectified(draft: Draft, place: EarlySum, positive: Collection[str]) -> list[str]:
    """What a Concat joins, each rectified by itself where all of it was.

    So each can become part of the convolution that it comes from, also where the Concat stays.
    """
    concat, relu = place.concat, place.relu
    if relu is None:
        return list(concat.input)
    names: dict[str, str] = {}
    for name in dict.fromkeys(concat.input):
        if name in positive:
            continue
        kind = draft.view.model.tensors[name]
        names[name] = draft.declare(f"{relu.output[0]}/{len(names)}", kind)
        own = renamed(relu, {relu.input[0]: name}, {relu.output[0]: names[name]})
        own.name = f"{relu.name}/{len(names) - 1}"
        draft.added.setdefault(concat.name, []).append(own)
    draft.changed[concat.name] = renamed(concat, names, {concat.output[0]: relu.output[0]})
    draft.removed.add(relu.name)
    return [names.get(name, name) for name in concat.input]


def _sum(draft: Draft, place: EarlySum, parts: Sequence[str]) -> None:
    """One convolution of the last part, which keeps the bias, and one of all others."""
    node, late = place.reader, place.late
    counts = [(draft.view.model.tensors[name].shape or ())[1] for name in place.concat.input]
    start = sum(counts[:late])
    channels = range(start, start + counts[late])
    weight = draft.view.array(node.input[1])
    others = [part for position, part in enumerate(parts) if position != late]
    nodes = [_joined(draft, place, others, sum(counts) - len(channels))] if others[1:] else []
    early = nodes[-1].output[0] if nodes else others[0]
    nodes.append(_part(draft, node, "early", [early], np.delete(weight, channels, 1)))
    rest = [parts[late], *node.input[2:]]
    nodes.append(_part(draft, node, "late", rest, np.take(weight, channels, 1)))
    added = [part.output[0] for part in reversed(nodes[-2:])]
    nodes.append(helper.make_node("Add", added, node.output, f"{node.name}/sum"))
    draft.added.setdefault(node.name, []).extend(nodes)
    draft.removed.add(node.name)


def _joined(
    draft: Draft, place: EarlySum, parts: Sequence[str], channel_count: int
) -> onnx.NodeProto:
    """A Concat of all parts but the last one."""
    result = place.concat.output[0]
    kind = with_size(draft.view.model.tensors[result], 1, channel_count)
    name = draft.declare(f"{result}/early", kind)
    return helper.make_node("Concat", parts, [name], f"{place.concat.name}/early", axis=1)


def _part(
    draft: Draft, node: onnx.NodeProto, suffix: str, reads: Sequence[str], weight: np.ndarray
) -> onnx.NodeProto:
    """A convolution of some of the channels.

    Args:
        draft: What changes.
        node: That of all channels.
        suffix: What is put behind its names.
        reads: The channels, and the bias if this part adds it.
        weight: The filters' values for these channels.
    """
    result = node.output[0]
    part = onnx.NodeProto()
    part.CopyFrom(node)
    part.name = f"{node.name}/{suffix}"
    stored = draft.store(f"{node.input[1]}/{suffix}", weight)
    part.input[:] = [reads[0], stored, *reads[1:]]
    part.output[:] = [draft.declare(f"{result}/{suffix}", draft.view.model.tensors[result])]
    return part
