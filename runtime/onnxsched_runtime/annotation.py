"""The annotation: how a schedule is written into an ONNX model, and read back.

Version 1. Each node carries `onnxsched.device`, `onnxsched.stream` and `onnxsched.order`; the
model carries `onnxsched.schema` and `onnxsched.schedule`, a JSON object with everything again,
from which the node keys are restored when another tool has dropped them. The fields are
described in docs/annotation.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import AnnotationError, UsageError
from onnxsched_runtime.fields import (
    damaged,
    json_object,
    read_element_type,
    read_field,
    read_number,
    read_shape,
    read_size,
)
from onnxsched_runtime.kernels import Kernels, kernels_from_json, kernels_to_json
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

SCHEMA = "1"
_DEVICE, _STREAM, _ORDER = "onnxsched.device", "onnxsched.stream", "onnxsched.order"
OUR_KEYS = "onnxsched."
"""How all keys of ours begin."""
_NODE_KEYS = {_DEVICE, _STREAM, _ORDER}
_SCHEMA_KEY, _SCHEDULE_KEY = "onnxsched.schema", "onnxsched.schedule"


@dataclass(frozen=True, slots=True)
class Annotation:
    """A schedule as a model carries it."""

    placements: Mapping[str, Placement]
    """Node name to placement, in launch order."""
    tensors: Mapping[str, TensorType]
    """The type of every tensor that flows between nodes, model inputs and outputs included."""
    host_reasons: Mapping[str, str]
    """Why a node can't be captured into a CUDA graph, for those that can't."""
    variant: Variant = DEFAULT_VARIANT
    """How its sessions execute it."""
    kernels: Kernels = field(default_factory=dict)
    """Which kernels of cuDNN's its convolutions and pools are computed by."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON for people and tools: policy, bound shapes, measured times, environment."""

    @property
    def bound_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input that the schedule is made for, as far as it is known."""
        shapes: Mapping[str, Sequence[int]] = self.details.get("bound_shapes", {})
        return {name: tuple(shape) for name, shape in shapes.items()}

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices it uses, in order."""
        return tuple(sorted({placement.device for placement in self.placements.values()}))


def write_annotation(model: onnx.ModelProto, annotation: Annotation) -> None:
    """Write the annotation into the model, in place, over any that is there.

    Raises:
        AnnotationError: The annotation does not name exactly the nodes of the model.
    """
    if not _names_each_node(model, annotation):
        raise AnnotationError("The schedule does not name exactly the model's nodes.")
    strip_annotation(model)
    content = {
        **annotation.details,
        "fingerprint": fingerprint(model),
        "nodes": [
            [name, str(placement.device), placement.stream]
            for name, placement in annotation.placements.items()
        ],
        "tensors": {n: [t.element_type, t.shape] for n, t in annotation.tensors.items()},
        "host_reasons": dict(annotation.host_reasons),
        "variant": annotation.variant.to_json(),
        "kernels": kernels_to_json(annotation.kernels),
    }
    _set(model, _SCHEMA_KEY, SCHEMA)
    _set(model, _SCHEDULE_KEY, json.dumps(content, separators=(",", ":")))
    _write_node_keys(model, annotation.placements)


def read_annotation(model: onnx.ModelProto) -> Annotation:
    """Read the annotation of a model.

    Node keys win over the model-level table, so that a schedule edited by hand is obeyed; if
    some or all of them are gone, those of the table take their place.

    Raises:
        AnnotationError: There is none, it is of another version, damaged, or belongs to
            another model.
    """
    values = {entry.key: entry.value for entry in model.metadata_props}
    if _SCHEDULE_KEY not in values:
        raise AnnotationError(
            "The model carries no onnxsched schedule; run `onnxsched optimize` on it first."
        )
    if values.get(_SCHEMA_KEY) != SCHEMA:
        raise AnnotationError(
            f"The schedule of the model has schema version {values.get(_SCHEMA_KEY)} and this "
            f"release reads version {SCHEMA}; run `onnxsched optimize` again."
        )
    content = json_object(values[_SCHEDULE_KEY])
    annotation = _parse(content)
    if read_field(content, "fingerprint", str) != fingerprint(model):
        raise AnnotationError(
            "The schedule of the model was made for another graph (nodes or edges have changed "
            "since); run `onnxsched optimize` again."
        )
    if not _names_each_node(model, annotation):
        raise damaged("it does not name exactly the model's nodes")
    annotation = _with_node_keys(model, annotation)
    if len({device.kind for device in annotation.devices}) > 1:
        used = ", ".join(map(str, annotation.devices))
        raise damaged(f"it uses {used}, and GPUs and the CPU can't share a model")
    return annotation


def restore_annotation(model: onnx.ModelProto) -> int:
    """Write node keys that another tool has dropped back from the model-level copy, in place.

    Returns:
        How many nodes had lost theirs.

    Raises:
        AnnotationError: As `read_annotation`.
    """
    annotation = read_annotation(model)
    lost = sum(not _NODE_KEYS.issubset(e.key for e in n.metadata_props) for n in model.graph.node)
    for node in model.graph.node:
        _remove(node.metadata_props, lambda key: key.startswith(OUR_KEYS))
    _write_node_keys(model, annotation.placements)
    return lost


def strip_annotation(model: onnx.ModelProto) -> bool:
    """Remove every `onnxsched.` key from the model and its nodes, in place.

    Returns:
        Whether there was one.
    """
    removed = _remove(model.metadata_props, lambda key: key.startswith(OUR_KEYS))
    for node in model.graph.node:
        removed |= _remove(node.metadata_props, lambda key: key.startswith(OUR_KEYS))
    return removed


def fingerprint(model: onnx.ModelProto) -> str:
    """A hash of the main graph's nodes, attributes and edges, the same in every order of nodes.

    Weights do not count: a model may be trained further and keep its schedule.
    """
    rows = sorted(
        repr((n.name, n.domain, n.op_type, list(n.input), list(n.output), attribute_digests(n)))
        for n in model.graph.node
    )
    ends = repr(([v.name for v in model.graph.input], [v.name for v in model.graph.output]))
    return hashlib.sha256("\n".join([*rows, ends]).encode()).hexdigest()[:32]


def attribute_digests(node: onnx.NodeProto) -> list[str]:
    """A hash of each attribute, subgraphs included, whatever their order."""
    return sorted(
        hashlib.sha256(attribute.SerializeToString(deterministic=True)).hexdigest()
        for attribute in node.attribute
    )


def _names_each_node(model: onnx.ModelProto, annotation: Annotation) -> bool:
    names = [node.name for node in model.graph.node]
    return len(names) == len(annotation.placements) and set(names) == set(annotation.placements)


def _parse(content: Mapping[str, Any]) -> Annotation:
    own = {"fingerprint", "nodes", "tensors", "host_reasons", "variant", "kernels"}
    read_field(content, "bound_shapes", lambda shapes: [*map(read_shape, shapes.values())], {})
    return Annotation(
        placements=read_field(content, "nodes", _placements),
        tensors=read_field(content, "tensors", _tensors),
        host_reasons=read_field(
            content, "host_reasons", lambda found: {n: str(reason) for n, reason in found.items()}
        ),
        variant=read_field(content, "variant", Variant.from_json, {}),
        kernels=read_field(content, "kernels", kernels_from_json, []),
        details={key: value for key, value in content.items() if key not in own},
    )


def _placements(rows: Any) -> dict[str, Placement]:
    return {name: Placement(Device.parse(d), read_size(stream)) for name, d, stream in rows}


def _tensors(content: Any) -> dict[str, TensorType]:
    return {
        name: TensorType(read_element_type(element), None if shape is None else read_shape(shape))
        for name, (element, shape) in content.items()
    }


def _with_node_keys(model: onnx.ModelProto, annotation: Annotation) -> Annotation:
    """Let complete node keys override the table."""
    order: dict[str, int] = {}
    placements: dict[str, Placement] = {}
    for node in model.graph.node:
        keys = {entry.key: entry.value for entry in node.metadata_props}
        if not _NODE_KEYS.issubset(keys):
            return annotation
        try:
            order[node.name] = read_number(keys[_ORDER])
            placements[node.name] = Placement(
                Device.parse(keys[_DEVICE]), read_number(keys[_STREAM])
            )
        except (ValueError, UsageError) as error:
            raise damaged(f"node '{node.name}': {str(error).rstrip('.')}") from error
    if sorted(order.values()) != [*range(len(order))]:
        raise damaged(f"its nodes have not each one of the launch positions 0 to {len(order) - 1}")
    ordered = {name: placements[name] for name in sorted(order, key=order.__getitem__)}
    return replace(annotation, placements=ordered)


def _write_node_keys(model: onnx.ModelProto, placements: Mapping[str, Placement]) -> None:
    order = {name: position for position, name in enumerate(placements)}
    for node in model.graph.node:
        placement = placements[node.name]
        _set(node, _DEVICE, str(placement.device))
        _set(node, _STREAM, str(placement.stream))
        _set(node, _ORDER, str(order[node.name]))


def _set(holder: onnx.ModelProto | onnx.NodeProto, key: str, value: str) -> None:
    entry = holder.metadata_props.add()
    entry.key, entry.value = key, value


def _remove(entries: Any, condition: Callable[[str], bool]) -> bool:
    kept = [entry for entry in entries if not condition(entry.key)]
    if len(kept) == len(entries):
        return False
    del entries[:]
    entries.extend(kept)
    return True
