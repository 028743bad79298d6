"""What a model says of itself, and ORT does not save: it is carried over by name."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxsched_runtime.annotation import OUR_KEYS


def keep_notes(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Give a model the notes of the one that it was made of, in place.

    That is metadata of the graph and its nodes, descriptions and metadata of inputs and outputs,
    and how tensors are quantized, for all that is there under the same name.
    """
    graph, before = model.graph, original.graph
    graph.metadata_props.extend(_others(before.metadata_props, graph.metadata_props))
    for values, origins in ((graph.input, before.input), (graph.output, before.output)):
        known = {value.name: value for value in origins}
        for value in values:
            if origin := known.get(value.name):
                if origin.doc_string and not value.doc_string:
                    value.doc_string = origin.doc_string
                notes = _others(origin.metadata_props, value.metadata_props)
                value.metadata_props.extend(notes)
    nodes = {(node.name, node.op_type): node for node in before.node}
    for node in graph.node:
        if named := nodes.get((node.name, node.op_type)):
            node.metadata_props.extend(_others(named.metadata_props, node.metadata_props))
    tensors = {weight.name for weight in graph.initializer}
    tensors.update(value.name for value in graph.input)
    tensors.update(name for node in graph.node for name in node.output)
    tensors.difference_update(note.tensor_name for note in graph.quantization_annotation)
    graph.quantization_annotation.extend(
        note for note in before.quantization_annotation if note.tensor_name in tensors
    )


def _others(
    notes: Iterable[onnx.StringStringEntryProto], there: Iterable[onnx.StringStringEntryProto]
) -> list[onnx.StringStringEntryProto]:
    """Those whose keys are not there yet, without those of an older schedule."""
    keys = {note.key for note in there}
    return [note for note in notes if note.key not in keys and not note.key.startswith(OUR_KEYS)]
