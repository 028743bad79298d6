"""Segments that compute the same with other weights: one session can run them all.

Each session holds tens of megabytes of cuBLAS workspace, and a transformer is one layer many times
over. With names made canonical and large weights made inputs, equal segments become equal models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import helper

from onnxsched_runtime.model import ModelPart, ModelSource, node_reads
from onnxsched_runtime.plan import Segment


@dataclass(frozen=True)
class Template:
    """A segment with canonical names and without weights."""

    part: ModelPart
    inputs: Mapping[str, str]
    """Canonical name to tensor."""
    weights: Mapping[str, str]
    """Canonical name to weight."""
    outputs: Mapping[str, str]
    """Canonical name to tensor."""


def template_of(source: ModelSource, segment: Segment) -> Template | None:
    """The segment as others like it see it; None where it can't be shared.

    Convolutions can't: the kernels of some prepare their weights once, which an input forbids.
    """
    nodes = [source.nodes[name] for name in segment.nodes]
    if any("Conv" in node.op_type or _has_body(node) for node in nodes):
        return None
    used = dict.fromkeys(t for node in nodes for t in node_reads(node))
    weights = [name for name in used if source.large_weight(name) is not None]
    constants = [name for name in used if source.is_weight(name) and name not in weights]
    flowing = [*segment.inputs, *weights, *(t for node in nodes for t in node.output if t)]
    canonical = {name: f"t{number}" for number, name in enumerate(dict.fromkeys(flowing))}
    canonical |= {name: f"c{number}" for number, name in enumerate(constants)}
    graph = helper.make_graph(
        [_renamed(node, f"n{number}", canonical) for number, node in enumerate(nodes)],
        "template",
        [_value(source, name, canonical[name]) for name in (*segment.inputs, *weights)],
        [_value(source, name, canonical[name]) for name in segment.outputs],
        [source.constant(name, canonical[name]) for name in constants],
    )
    model = helper.make_model(
        graph, opset_imports=source.model.opset_import, ir_version=source.model.ir_version
    )
    return Template(
        ModelPart(model.SerializeToString(deterministic=True), {}),
        {canonical[name]: name for name in segment.inputs},
        {canonical[name]: name for name in weights},
        {canonical[name]: name for name in segment.outputs},
    )


def _has_body(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _renamed(node: onnx.NodeProto, name: str, canonical: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    copy.ClearField("doc_string")
    del copy.metadata_props[:]
    copy.input[:] = [canonical[t] if t else "" for t in node.input]
    copy.output[:] = [canonical[t] if t else "" for t in node.output]
    return copy


def _value(source: ModelSource, name: str, canonical: str) -> onnx.ValueInfoProto:
    kind = source.kind_of(name)
    return helper.make_tensor_value_info(canonical, kind.element_type, kind.shape)
