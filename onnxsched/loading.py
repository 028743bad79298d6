"""From a path to a checked model whose operators can be scheduled."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError, OnnxschedError, UsageError
from onnxsched_runtime.model import node_reads, read_model, write_model
from onnxsched_runtime.session import SessionSettings, optimize_file
from onnxsched_runtime.tensor import TensorType

_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
           "Multinomial", "Bernoulli"}  # fmt: skip
_MIN_IR, _MAX_IR = 10, 13
"""Node metadata needs IR 10; ONNX Runtime 1.31 reads up to IR 13."""
_MAX_CONCAT = 32
_WEIGHT_NBYTES = 1024
"""Initializers above this hold weights, not shapes: shape inference does without them."""


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


def parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Read `NAME:1x3x224x224` options.

    Raises:
        UsageError: An option is not of that form.
    """
    shapes = {}
    for text in texts:
        match = re.fullmatch(r"(.+):(\d+(?:x\d+)*|scalar)", text)
        if match is None:
            raise UsageError(f"--shape {text} can't be read: write NAME:1x3x224x224.")
        dims = () if match[2] == "scalar" else tuple(int(dim) for dim in match[2].split("x"))
        shapes[match[1]] = dims
    return shapes


def load_model(
    path: str | Path,
    device: Device,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    custom_ops: tuple[str, ...] = (),
) -> Model:
    """Read a model, bind its shapes, and let ORT fold constants and fuse operators.

    Raises:
        UsageError: There is no such file, or a shape does not fit or is missing.
        ModelError: The model can't be read, is invalid, or ORT refuses it.
        DeviceError: The device is not available.
    """
    baseline = read_model(path)
    _check(baseline, path)
    baseline.ir_version = max(_MIN_IR, min(baseline.ir_version, _MAX_IR))
    if baseline.functions:
        baseline = onnx.inliner.inline_local_functions(baseline)
    bind_shapes(baseline, shapes or {})
    _narrow_concats(baseline)
    _name_nodes(baseline)
    proto, on_cpu = _optimized(baseline, device, custom_ops)
    _give_outputs_a_node(proto)
    _name_nodes(proto)
    tensors = tensor_types(proto)
    weights = {weight.name for weight in proto.graph.initializer}
    bound = {
        value.name: tensors[value.name].shape or ()
        for value in proto.graph.input
        if value.name in tensors and value.name not in weights
    }
    reasons = _host_reasons(proto, tensors, on_cpu)
    return Model(proto, tensors, reasons, bound, baseline)


def bind_shapes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give every input the static shape asked for, in place.

    A symbol bound through one input is bound in all others.

    Raises:
        UsageError: A shape names no input, contradicts the model or another shape, or leaves a
            dimension without a value.
    """
    weights = {weight.name for weight in model.graph.initializer}
    inputs = {v.name: v for v in model.graph.input if v.name not in weights}
    if unknown := shapes.keys() - inputs.keys():
        raise UsageError(
            f"--shape names '{min(unknown)}', which is no input; the inputs are {list(inputs)}."
        )
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        _bind(name, inputs[name], shape, symbols)
    unbound = []
    for name, value in inputs.items():
        if not value.type.HasField("tensor_type"):
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
            elif not dim.HasField("dim_value"):
                unbound.append(f"{name}[{axis}]" + (f" ('{dim.dim_param}')" * bool(dim.dim_param)))
        if not value.type.tensor_type.HasField("shape"):
            unbound.append(f"{name} (of unknown rank)")
    if unbound:
        raise UsageError(
            f"These dimensions have no value: {', '.join(unbound)}; give each input its shape "
            "with --shape NAME:1x3x224x224."
        )
    _forget_symbolic_shapes(model)


def _bind(
    name: str, value: onnx.ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int]
) -> None:
    kind = value.type.tensor_type
    dims = list(kind.shape.dim)
    if kind.HasField("shape") and len(dims) != len(shape):
        raise UsageError(f"--shape gives '{name}' {len(shape)} dimensions, it has {len(dims)}.")
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=False)):
        fixed = dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param)
        if fixed is not None and fixed != size:
            raise UsageError(f"--shape gives {name}[{axis}] {size}, but it is {fixed}.")
        if dim.dim_param:
            symbols[dim.dim_param] = size
    del kind.shape.dim[:]
    for size in shape:
        kind.shape.dim.add().dim_value = size


def _forget_symbolic_shapes(model: onnx.ModelProto) -> None:
    """Drop shapes with symbols, which inference now finds with their values."""
    inferred = [v for v in model.graph.value_info if not _has_symbol(v)]
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred)
    for value in model.graph.output:
        if _has_symbol(value):
            value.type.tensor_type.ClearField("shape")


def _has_symbol(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ()
    return any(not dim.HasField("dim_value") for dim in dims)


def _narrow_concats(model: onnx.ModelProto) -> None:
    """Make a tree of every Concat with more inputs than ORT can capture, in place; exact.

    Above 32 inputs ORT's CUDA kernel refuses a capture and then ends the process.
    """
    nodes: list[onnx.NodeProto] = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "Concat" and node.domain in ("", "ai.onnx"):
            while len(node.input) > _MAX_CONCAT:
                part = onnx.NodeProto()
                part.CopyFrom(node)
                del part.input[_MAX_CONCAT:]
                part.name, part.output[0] = (
                    f"{stem}/part{len(nodes)}" for stem in (node.name or "concat", node.output[0])
                )
                nodes.append(part)
                node.input[:] = [part.output[0], *node.input[_MAX_CONCAT:]]
        nodes.append(node)
    if len(nodes) > len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _check(model: onnx.ModelProto, path: str | Path) -> None:
    try:
        if model.ByteSize() < 2**31 - 1:
            onnx.checker.check_model(model)
        else:
            onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"'{path}' is no valid ONNX model: {reason}") from error


def _optimized(
    model: onnx.ModelProto, device: Device, custom_ops: tuple[str, ...]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Constants folded and operators fused by ORT; and which nodes need the CPU."""
    settings = SessionSettings(
        device, level="extended", host_operators=True, custom_ops=custom_ops
    )
    with tempfile.TemporaryDirectory(prefix="onnxsched-") as scratch:
        source, target = Path(scratch, "bound.onnx"), Path(scratch, "optimized.onnx")
        write_model(model, source)
        on_cpu = optimize_file(source, target, settings)
        try:
            optimized = read_model(target)
        except OnnxschedError as error:
            raise ModelError(
                "Nothing is left to schedule: every output of the model is a constant."
            ) from error
    optimized.ir_version = max(_MIN_IR, min(optimized.ir_version, _MAX_IR))
    return optimized, on_cpu


def _give_outputs_a_node(model: onnx.ModelProto) -> None:
    """Put an Identity before outputs that ORT has folded to constants, in place.

    Raises:
        ModelError: An output is an input passed through.
    """
    graph = model.graph
    written = {name for node in graph.node for name in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    for value in graph.output:
        if value.name in written:
            continue
        if value.name not in weights:
            raise ModelError(
                f"Output '{value.name}' is an input passed through, which no operator computes; "
                "remove it from the model's outputs."
            )
        constant = f"{value.name}/constant"
        weights[value.name].name = constant
        for node in graph.node:
            node.input[:] = [constant if name == value.name else name for name in node.input]
        graph.node.append(helper.make_node("Identity", [constant], [value.name]))


def _name_nodes(model: onnx.ModelProto) -> None:
    """Make node names unique, keeping those that are."""
    taken: set[str] = set()
    for node in model.graph.node:
        stem = node.name or f"{node.op_type}_{next(filter(None, node.output), '')}"
        name, number = stem, 1
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        node.name = name
        taken.add(name)


def tensor_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    """The type of every tensor of the main graph that is not a weight.

    ORT stores what it inferred, contrib operators included; what it left out is inferred by
    onnx from there. Sequences and optionals have no entry.
    """
    light = onnx.ModelProto()
    light.CopyFrom(_without_weights(model))
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    weights = {weight.name for weight in model.graph.initializer}
    types = {}
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        if value.type.HasField("tensor_type") and value.name not in weights:
            tensor = value.type.tensor_type
            static = tensor.HasField("shape") and not _has_symbol(value)
            shape = tuple(dim.dim_value for dim in tensor.shape.dim) if static else None
            types[value.name] = TensorType(tensor.elem_type, shape)
    return types


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large initializers as typed inputs, so that it copies quickly."""
    graph = model.graph
    heavy = [w for w in graph.initializer if w.ByteSize() > _WEIGHT_NBYTES]
    names = {weight.name for weight in heavy}
    light = onnx.GraphProto(name=graph.name, node=graph.node, value_info=graph.value_info)
    light.initializer.extend(w for w in graph.initializer if w.name not in names)
    light.input.extend(v for v in graph.input if v.name not in names)
    light.input.extend(
        helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in heavy
    )
    light.output.extend(graph.output)
    return helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)


def _host_reasons(
    model: onnx.ModelProto, tensors: Mapping[str, TensorType], on_cpu: Mapping[str, str]
) -> dict[str, str]:
    weights = {weight.name for weight in model.graph.initializer}
    reasons = {}
    for node in model.graph.node:
        flowing = [*(n for n in node_reads(node) if n not in weights), *filter(None, node.output)]
        if reason := _host_reason(node, flowing, tensors, on_cpu):
            reasons[node.name] = reason
    return reasons


def _host_reason(
    node: onnx.NodeProto,
    flowing: list[str],
    tensors: Mapping[str, TensorType],
    on_cpu: Mapping[str, str],
) -> str | None:
    """Why a node can't be captured; None where it can."""
    if node.op_type in _CONTROL_FLOW and node.domain in ("", "ai.onnx"):
        return f"{node.op_type} decides at run time what to execute"
    if node.op_type in _RANDOM:
        return f"{node.op_type} draws numbers that a replay would repeat"
    for name in flowing:
        kind = tensors.get(name)
        if kind is None:
            return f"'{name}' is a sequence or optional"
        if kind.element_type == TensorProto.STRING:
            return f"'{name}' holds strings"
        if kind.shape is None:
            return f"the shape of '{name}' depends on the data"
        if not kind.is_static:
            return f"'{name}' is of a type without device buffers"
    if node.name in on_cpu:
        return f"ONNX Runtime runs {node.op_type} on the CPU"
    return None


def graph_from_model(model: Model) -> OperatorGraph:
    """The operator graph that scheduling works on."""
    index = {node.name: i for i, node in enumerate(model.proto.graph.node)}
    writer = {t: index[n.name] for n in model.proto.graph.node for t in n.output if t}
    operators = tuple(
        Operator(node.name, node.op_type, model.host_reasons.get(node.name))
        for node in model.proto.graph.node
    )
    edges = tuple(
        Edge(writer[name], index[node.name], name, _nbytes(model.tensors.get(name)))
        for node in model.proto.graph.node
        for name in node_reads(node)
        if name in writer
    )
    return OperatorGraph(operators, edges)


def _nbytes(kind: TensorType | None) -> int:
    return 0 if kind is None else kind.nbytes
