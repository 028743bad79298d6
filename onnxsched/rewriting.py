"""Other operators that compute the same: rewrites of the portable model, chosen by measurement.

Merging siblings makes fewer and larger operators, but a longer way through the model for the
smallest of them: whether it pays depends on the schedule, so it is tried with schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx
from onnx import helper

from onnxsched.loading import NO_REWRITE, Model
from onnxsched.merging import Draft, merge
from onnxsched.siblings import GraphView, find_siblings
from onnxsched_runtime.device import Device
from onnxsched_runtime.model import input_values, name_nodes, node_reads

REWRITES: Mapping[str, Mapping[str, bool]] = {
    "merge": {},
    "merge-inner": {"is_inner": True},
    "merge-padded": {"is_padded": True},
}
"""Which siblings each rewrite merges, as `find_siblings` takes it."""


def possible_rewrites(model: Model, device: Device) -> tuple[str, ...]:
    """The rewrites that change a model, each in another way, the most thorough first."""
    if device.kind == "cpu" or model.host_reasons:
        return ()
    view = GraphView(model)
    found: dict[tuple[tuple[str, ...], ...], str] = {}
    for name, scope in REWRITES.items():
        groups = find_siblings(view, **scope)
        names = tuple(tuple(sibling.node.name for sibling in group) for group in groups)
        if names:
            found.setdefault(names, name)
    return tuple(found.values())


def rewritten(model: Model, rewrite: str) -> Model:
    """The model with siblings merged: equal within rounding, the same inputs and outputs.

    Only standard operators are added, and the same model is always rewritten to the same nodes
    and names. O(nodes, edges and bytes of weights).

    Args:
        model: A portable model that is not rewritten.
        rewrite: A name in `REWRITES`, or `none`.

    Raises:
        KeyError: There is no such rewrite.
    """
    if rewrite == NO_REWRITE:
        return model
    view = GraphView(model)
    draft = Draft(view)
    for group in find_siblings(view, **REWRITES[rewrite]):
        merge(draft, group)
    return _assembled(draft, rewrite)


def _assembled(draft: Draft, rewrite: str) -> Model:
    """The model of a draft."""
    model, old = draft.view.model, draft.view.model.proto.graph
    nodes = _read_nodes(draft)
    used = {name for node in nodes for name in node_reads(node)}
    unread = {w.name for w in old.initializer if w.name in draft.view.readers} - used
    flowing = {name for node in nodes for name in node.output}
    flowing |= {value.name for value in input_values(model.proto)}
    tensors = {**model.tensors, **draft.tensors}
    proto = onnx.ModelProto(
        ir_version=model.proto.ir_version,
        opset_import=model.proto.opset_import,
        metadata_props=model.proto.metadata_props,
    )
    graph = proto.graph
    graph.name = old.name
    graph.node.extend(nodes)
    graph.initializer.extend(weight for weight in old.initializer if weight.name not in unread)
    graph.initializer.extend(draft.weights)
    graph.input.extend(value for value in old.input if value.name not in unread)
    graph.output.extend(old.output)
    graph.value_info.extend(value for value in old.value_info if value.name in flowing)
    graph.value_info.extend(
        helper.make_tensor_value_info(name, kind.element_type, kind.shape)
        for name, kind in draft.tensors.items()
    )
    name_nodes(proto)
    types = {name: kind for name, kind in tensors.items() if name in flowing}
    return replace(model, proto=proto, tensors=types, rewrite=rewrite)


def _read_nodes(draft: Draft) -> list[onnx.NodeProto]:
    """The nodes of a draft but for those that only replaced ones have read."""
    view, nodes = draft.view, draft.nodes()
    used = {name for node in nodes for name in node_reads(node)} | view.outputs
    return [
        node
        for node in nodes
        if used.intersection(node.output) or not any(map(view.readers.get, node.output))
    ]
