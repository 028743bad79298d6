"""What ORT makes of a model: constants folded, functions expanded, operators fused."""

from __future__ import annotations

import onnx

from onnxsched.shapes import tensor_types
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError, OnnxschedError
from onnxsched_runtime.files import read_model, saved_by_ort, scratch_folder, write_model
from onnxsched_runtime.model import node_reads, read_instead, subgraphs
from onnxsched_runtime.naming import new_name
from onnxsched_runtime.session import optimize_file
from onnxsched_runtime.settings import SessionSettings

_NEVER_FOLDED = "DequantizeLinear"
"""ORT keeps it before what it may fuse it with."""


def optimized(
    model: onnx.ModelProto, device: Device, custom_ops: tuple[str, ...]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Let ORT optimize a model, and its own result for as long as that helps.

    ORT expands operators that it has no kernel for after it has folded constants, so what they
    consist of is folded, and fused, the next time only.

    Returns:
        The optimized model, and the nodes that need the CPU with their operator types.

    Raises:
        ModelError: ORT refuses the model, or all of it is constant.
        DeviceError: The device is not available.
    """
    settings = SessionSettings(device, host_operators=True, custom_ops=custom_ops)
    found, on_cpu = _optimized_once(model, settings)
    while _is_half_folded(found):
        count = len(found.graph.node)
        found, on_cpu = _optimized_once(found, settings)
        if len(found.graph.node) >= count:
            break
    return found, on_cpu


def _optimized_once(
    model: onnx.ModelProto, settings: SessionSettings
) -> tuple[onnx.ModelProto, dict[str, str]]:
    with scratch_folder() as scratch:
        source, target = scratch / "bound.onnx", scratch / "optimized.onnx"
        write_model(model, source)
        with saved_by_ort(scratch):
            on_cpu = optimize_file(source, target, settings)
        try:
            found = read_model(target)
        except OnnxschedError as error:
            raise ModelError(
                "Nothing is left to schedule: every output of the model is a constant."
            ) from error
    _tell_apart(found.graph, set(), _all_tensors(found.graph))
    return found, on_cpu


def _tell_apart(graph: onnx.GraphProto, outside: set[str], used: set[str]) -> None:
    """Rename what is called in a subgraph as another tensor is outside of it, in place.

    ONNX forbids that, and refuses the file. ORT does so with the casts that it adds.

    Args:
        graph: The graph; the same is done for what its subgraphs hold.
        outside: What it sees from outside.
        used: All names, those given here included.
    """
    taken = outside | _tensors(graph)
    for node in graph.node:
        for body in subgraphs(node):
            _tell_apart(body, taken, used)
            clashing = sorted(taken & _tensors(body))
            instead = {name: new_name(name, used) for name in clashing}
            for value in (*body.input, *body.output, *body.value_info, *body.initializer):
                value.name = instead.get(value.name, value.name)
            for inner in body.node:
                inner.output[:] = [instead.get(name, name) for name in inner.output]
            read_instead(body, instead)


def _tensors(graph: onnx.GraphProto) -> set[str]:
    """The tensors that a graph itself names: what it is given, holds and computes."""
    named = {value.name for value in (*graph.input, *graph.initializer)}
    return named.union(name for node in graph.node for name in node.output if name)


def _all_tensors(graph: onnx.GraphProto) -> set[str]:
    bodies = (body for node in graph.node for body in subgraphs(node))
    return _tensors(graph).union(*map(_all_tensors, bodies))


def _is_half_folded(model: onnx.ModelProto) -> bool:
    """Whether an operator reads weights alone, or the shape of a tensor that has a fixed one."""
    weights = {weight.name for weight in model.graph.initializer}
    shaped = []
    for node in model.graph.node:
        reads = node_reads(node)
        if reads and node.op_type != _NEVER_FOLDED and weights.issuperset(reads):
            return True
        if node.op_type == "Shape":
            shaped.append(node.input[0])
    if not shaped:
        return False
    types = tensor_types(model)
    return any(name in types and types[name].shape is not None for name in shaped)
