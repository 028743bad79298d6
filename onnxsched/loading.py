"""From a path to a checked model whose operators can be scheduled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from onnxsched.capturability import host_reasons
from onnxsched.graph import Edge, Operator, OperatorGraph, Weight
from onnxsched.half_precision import in_float16
from onnxsched.notes import keep_notes
from onnxsched.optimizing import optimized
from onnxsched.pool_padding import agree_on_pool, has_doubtful_pool, without_doubtful_pools
from onnxsched.reading import allow_node_keys, read_valid_model
from onnxsched.shapes import (
    bind_shapes,
    declare_output_shapes,
    declare_types,
    put_back,
    take_declarations,
    tensor_types,
)
from onnxsched.simplification import simplify
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.kernels import Kernels
from onnxsched_runtime.lowering import inferred_by_ort
from onnxsched_runtime.model import (
    give_outputs_a_node,
    input_values,
    is_standard,
    name_nodes,
    node_reads,
)
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from onnxsched_runtime.views import is_view

_MAX_CONCAT = 32

Precision = Literal["keep", "fp16"]
NO_REWRITE = "none"
Form = tuple[Variant, str]
"""How sessions execute a model, and what was made of its operators before."""
AS_LOADED: Form = (DEFAULT_VARIANT, NO_REWRITE)
"""What ORT does by itself."""


@dataclass(frozen=True)
class Model:
    """A model ready to be scheduled."""

    proto: onnx.ModelProto
    """Optimized by ORT, static shapes, uniquely named nodes in topological order."""
    tensors: Mapping[str, TensorType]
    """The type of every tensor that flows between nodes, inputs and outputs included."""
    host_reasons: Mapping[str, str]
    """Why a node can't be captured into a CUDA graph, for those that can't."""
    bound_shapes: Mapping[str, tuple[int, ...]]
    """The shapes of the inputs."""
    baseline: onnx.ModelProto
    """The model as the user gave it, shapes bound: what plain ORT runs."""
    variant: Variant = DEFAULT_VARIANT
    """How sessions execute it; its layout is already in `proto`."""
    is_lowered: bool = False
    """`proto` is what ORT makes of it for a GPU."""
    kernels: Kernels = field(default_factory=dict)
    """The fastest kernels of its convolutions and pools, where they were measured."""
    precision: Precision = "keep"
    """`fp16` where `proto` computes in float16 what the baseline computes in float32."""
    rewrite: str = NO_REWRITE
    """What has made `proto` of the operators that were loaded; a name that `rewritten` knows."""
    given: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    """Values of inputs that are not to be drawn at random."""

    @property
    def form(self) -> Form:
        """What tells it from others that were made of the same model."""
        return (self.variant, self.rewrite)

    @property
    def source(self) -> ModelSource:
        """What sessions are made from."""
        return ModelSource(self.proto, self.tensors, self.variant, self.is_lowered, self.kernels)


def with_refusals(model: Model, refusals: Mapping[str, str]) -> Model:
    """The model with more nodes left to the host: those whose capture was tried and failed."""
    return replace(model, host_reasons={**model.host_reasons, **refusals})


def load_model(
    path: str | Path,
    device: Device,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    custom_ops: tuple[str, ...] = (),
    precision: Precision = "keep",
) -> Model:
    """Read a model, bind its shapes, and let ORT fold constants and fuse operators.

    Args:
        path: An ONNX model.
        device: Where it will run.
        shapes: Shapes of inputs whose dimensions are symbols.
        custom_ops: Shared libraries with custom operators.
        precision: `fp16` makes float32 float16 inside; the baseline stays as it is.

    Raises:
        UsageError: There is no such file, or a shape does not fit or is missing.
        ModelError: The model can't be read, is invalid, or ORT refuses it.
        DeviceError: The device is not available.
        OnnxschedError: There is no room in the temporary folder.
    """
    baseline = read_valid_model(path)
    outputs = onnx.GraphProto(output=baseline.graph.output).output
    bind_shapes(baseline, shapes or {})
    _narrow_concats(baseline)
    name_nodes(baseline)
    _forget_what_ort_contradicts(baseline, device, custom_ops)
    declare_types(baseline)
    converted = in_float16(baseline) if precision == "fp16" else baseline
    proto, on_cpu = optimized(converted, device, custom_ops)
    allow_node_keys(proto)
    give_outputs_a_node(proto)
    name_nodes(proto)
    known = _with_what_ort_knows(proto, device, custom_ops)
    while has_doubtful_pool(proto) and agree_on_pool(proto, known):
        known = _with_what_ort_knows(proto, device, custom_ops)
    simplify(proto, known)
    tensors = tensor_types(proto)
    declare_output_shapes(proto, outputs)
    keep_notes(proto, baseline)
    bound = {
        value.name: tensors[value.name].shape or ()
        for value in input_values(proto)
        if value.name in tensors
    }
    reasons = host_reasons(proto, tensors, on_cpu)
    _require_arrays(proto, tensors, reasons, device)
    return Model(proto, tensors, reasons, bound, baseline, precision=precision)


def _forget_what_ort_contradicts(
    model: onnx.ModelProto, device: Device, custom_ops: tuple[str, ...]
) -> None:
    """Drop wrong shapes behind operators that onnx does not know, in place; see `bind_shapes`."""
    if all(onnx.defs.has(node.op_type, node.domain) for node in model.graph.node):
        return
    declared = take_declarations(model)
    settings = SessionSettings(device, host_operators=True, custom_ops=custom_ops)
    found = inferred_by_ort(ModelSource(model, tensor_types(model)), settings)
    known = {name: kind.shape for name, kind in found.items() if kind.shape is not None}
    put_back(model, declared, known)


def _with_what_ort_knows(
    model: onnx.ModelProto, device: Device, custom_ops: tuple[str, ...]
) -> Mapping[str, TensorType]:
    """The types of all tensors, those declared in place that only ORT can infer.

    These are of what its own operators write; others that depend on them are then inferred, by all
    that looks at the model later. Outputs have a shape unless it was wrong, see `agree_on_pool`.
    """
    tensors = tensor_types(model)
    written = {name for node in model.graph.node for name in node.output if name}
    bare = [v for v in model.graph.output if not v.type.tensor_type.HasField("shape")]
    shapeless = [v for v in bare if v.name in tensors and tensors[v.name].shape is None]
    if written <= tensors.keys() and not shapeless:
        return tensors
    settings = SessionSettings(device, host_operators=True, custom_ops=custom_ops)
    source = ModelSource(without_doubtful_pools(model, tensors), tensors)
    found = inferred_by_ort(source, settings)
    for value in shapeless:
        if value.name in found and found[value.name].shape is not None:
            value.type.CopyFrom(_declared(value.name, found[value.name]).type)
    ends = {value.name for value in model.graph.output}
    unknown = {n for n in written - ends if n not in tensors or tensors[n].shape is None}
    declared = [value for value in model.graph.value_info if value.name not in unknown]
    del model.graph.value_info[:]
    model.graph.value_info.extend(declared)
    model.graph.value_info.extend(
        _declared(name, found[name]) for name in sorted(unknown & found.keys())
    )
    return tensor_types(model)


def _declared(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind.element_type, kind.shape)


def _narrow_concats(model: onnx.ModelProto) -> None:
    """Make a tree of every Concat with more inputs than ORT can capture, in place; exact.

    Above 32 inputs ORT's CUDA kernel refuses a capture and then ends the process.
    """
    nodes: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if is_standard(node, "Concat"):
            while len(node.input) > _MAX_CONCAT:
                node.input[:] = _joined_parts(node, nodes)
        nodes.append(node)
    if len(nodes) > len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _joined_parts(concat: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> list[str]:
    """What joins the inputs of a Concat, as many at a time as ORT takes; added to `nodes`."""
    inputs, joined = list(concat.input), []
    for first in range(0, len(inputs), _MAX_CONCAT):
        few = inputs[first : first + _MAX_CONCAT]
        if len(few) == 1:
            joined += few
            continue
        part = onnx.NodeProto()
        part.CopyFrom(concat)
        part.input[:] = few
        part.name, part.output[0] = (
            f"{stem}/part{len(nodes)}" for stem in (concat.name or "concat", concat.output[0])
        )
        nodes.append(part)
        joined.append(part.output[0])
    return joined


def _require_arrays(
    model: onnx.ModelProto,
    tensors: Mapping[str, TensorType],
    host_reasons: Mapping[str, str],
    device: Device,
) -> None:
    """Refuse types that numpy does not have, where ORT would have to take or return them.

    That is everywhere on the CPU; on a GPU inputs, outputs, and what host operators touch.
    """
    is_cpu = device.kind == "cpu"
    where, instead = ("on the CPU", "use a GPU") if is_cpu else ("outside of the GPU", "cast it")
    passed = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        if node.name in host_reasons:
            passed.update(node_reads(node), node.output)
    for name, kind in tensors.items():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element_type)
        if dtype.isbuiltin != 1 and (is_cpu or name in passed):
            raise ModelError(f"'{name}' is a {kind}, which can't be scheduled {where}; {instead}.")


def graph_from_model(model: Model) -> OperatorGraph:
    """The operator graph that scheduling works on."""
    index = {node.name: i for i, node in enumerate(model.proto.graph.node)}
    writer = {t: index[n.name] for n in model.proto.graph.node for t in n.output if t}
    weights = _weights(model)
    kept = {value.name for value in model.proto.graph.output}
    read = {name for node in model.proto.graph.node for name in node_reads(node)}
    operators = tuple(
        Operator(
            node.name,
            node.op_type,
            model.host_reasons.get(node.name),
            tuple(weights[name] for name in node_reads(node) if name in weights),
            sum(
                _nbytes(model.tensors.get(name))
                for name in node.output
                if name in kept or name not in read
            ),
            is_view=is_view(node),
        )
        for node in model.proto.graph.node
    )
    edges = tuple(
        Edge(writer[name], index[node.name], name, _nbytes(model.tensors.get(name)))
        for node in model.proto.graph.node
        for name in node_reads(node)
        if name in writer
    )
    return OperatorGraph(operators, edges)


def _weights(model: Model) -> dict[str, Weight]:
    """What nodes read and none writes, by name: weights, and inputs of the model."""
    weights = {
        value.name: Weight(value.name, _nbytes(model.tensors.get(value.name)), is_input=True)
        for value in input_values(model.proto)
    }
    for weight in model.proto.graph.initializer:
        item = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        weights[weight.name] = Weight(weight.name, math.prod(weight.dims) * item)
    return weights


def _nbytes(kind: TensorType | None) -> int:
    return 0 if kind is None else kind.nbytes
