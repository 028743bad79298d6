"""Operators that are there twice, for readers on another device."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxsched.drafting import Draft, assembled
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.recomputing import Duplicate


def duplicated(model: Model, duplicates: Iterable[Duplicate]) -> Model:
    """The model with copies of operators that some of their readers read instead; equal.

    The copies share their originals' weights. The operator graph of the model is that of the
    `Recomputation` that the duplicates come from. O(duplicates * nodes).

    Args:
        model: A portable model.
        duplicates: As `recompute` finds them, in that order.
    """
    for duplicate in duplicates:
        model = _with_copy(model, duplicate)
    return model


def _with_copy(model: Model, duplicate: Duplicate) -> Model:
    draft = Draft(GraphView(model))
    node_of = {node.name: node for node in model.proto.graph.node}
    copy = onnx.NodeProto()
    copy.CopyFrom(node_of[duplicate.operator])
    copy.name = duplicate.copy
    renamed = {
        name: draft.declare(f"{duplicate.copy}/{name}", model.tensors[name])
        for name in copy.output
        if name
    }
    copy.output[:] = [renamed.get(name, name) for name in copy.output]
    draft.added[duplicate.operator] = [copy]
    for name in duplicate.consumers:
        consumer = onnx.NodeProto()
        consumer.CopyFrom(node_of[name])
        consumer.input[:] = [renamed.get(tensor, tensor) for tensor in consumer.input]
        draft.changed[name] = consumer
    return assembled(draft, model.rewrite)
