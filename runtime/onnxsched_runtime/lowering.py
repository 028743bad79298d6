"""From the portable model to the one that sessions hold: ORT lowers it once, before it is cut.

A layout is a property of the whole model: lowered part by part, every cut would transpose. And
what is lowered runs in the order of its nodes, which no optimization changes any more.
ORT renames what it rewrites (`NAME_token_7`), adds transposes and fuses operators away, so a
schedule is carried over by the names that are left, and the rest goes where its neighbours are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.files import read_model, saved_by_ort, scratch_folder
from onnxsched_runtime.fusing import fused
from onnxsched_runtime.model import (
    declared_types,
    give_outputs_a_node,
    input_values,
    is_standard,
    name_nodes,
    node_reads,
    sources_of,
)
from onnxsched_runtime.moving import moved
from onnxsched_runtime.naming import new_name
from onnxsched_runtime.ordering import topological
from onnxsched_runtime.pooling import pooled
from onnxsched_runtime.session import OrtSession, lower_to_file
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.views import is_idle, permutation

_RENAMED = re.compile(r"(.+)_token_\d+(?:_\d+)?")

_Key = tuple[int, int, int]
"""Launch position of the operator gone by, before or after it, position in the model."""


def lower(source: ModelSource, device: Device, custom_ops: tuple[str, ...] = ()) -> ModelSource:
    """The model as the sessions of its variant execute it.

    Args:
        source: The portable model; all of its operators must run on the device.
        device: A GPU.
        custom_ops: Libraries of custom operators.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
        OnnxschedError: There is no room in the temporary folder.
    """
    settings = SessionSettings(device, custom_ops=custom_ops, variant=source.variant)
    with scratch_folder() as scratch:
        lowered = scratch / "lowered.onnx"
        with saved_by_ort(scratch):
            lower_to_file(source.whole(), lowered, settings)
        model = read_model(lowered)
    give_outputs_a_node(model)
    name_nodes(model)
    untyped = ModelSource(model, _declared(model), source.variant)
    known = dict(untyped.tensors)
    if source.variant.layout == "nchw":  # else a name may stand for another layout
        known = {**source.tensors, **known}
    written = {tensor for node in model.graph.node for tensor in node.output if tensor}
    if not written <= known.keys():
        scalars = {name: kind for name, kind in source.tensors.items() if kind.shape == ()}
        static = {name: kind for name, kind in known.items() if kind.shape is not None}
        known |= {**inferred_by_ort(untyped, settings), **scalars, **static}
    flowing = written.union(value.name for value in model.graph.input)
    tensors = {name: kind for name, kind in known.items() if name in flowing}
    show_idle_transposes_as_views(model, tensors)
    gather_as_transposed(model)
    made = replace(source, model=model, tensors=tensors, is_lowered=True)
    is_fused = source.variant.fuses and source.variant.tf32  # cuDNN's kernels may use it
    return moved(pooled(fused(made))) if is_fused else made


def show_idle_transposes_as_views(
    model: onnx.ModelProto, tensors: Mapping[str, TensorType]
) -> None:
    """Make a Reshape, which copies nothing, of each Transpose that moves no number, in place.

    ORT adds such a Transpose where it changes the layout of an image of one point.
    """
    taken = {weight.name for weight in model.graph.initializer} | tensors.keys()
    for node in model.graph.node:
        shape = _shape_of_idle_transpose(node, tensors)
        if shape is None:
            continue
        name = new_name(f"{node.name}/shape", taken)
        weight = helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape)
        model.graph.initializer.append(weight)
        node.CopyFrom(helper.make_node("Reshape", [node.input[0], name], node.output, node.name))


def _shape_of_idle_transpose(
    node: onnx.NodeProto, tensors: Mapping[str, TensorType]
) -> tuple[int, ...] | None:
    """The shape of what a Transpose writes; None where it moves numbers, or is none."""
    if not is_standard(node, "Transpose"):
        return None
    before, after = (tensors.get(name) for name in (node.input[0], node.output[0]))
    if before is None or before.shape is None or after is None or after.shape is None:
        return None
    return after.shape if is_idle(node, before.shape) and 0 not in after.shape else None


def gather_as_transposed(model: onnx.ModelProto) -> None:
    """Let a Gather out of a vector write what a Transpose makes of it for nothing, in place."""
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    writer = {tensor: node for node in graph.node for tensor in node.output}
    readers = Counter(tensor for node in graph.node for tensor in node_reads(node))
    readers.update(value.name for value in graph.output)
    standard = [node for node in graph.node if is_standard(node)]
    shapes = {node.output[0]: node for node in standard if node.op_type == "Reshape"}
    taken = {*weights, *writer, *readers}
    for node in [node for node in standard if node.op_type == "Transpose"]:
        gather = writer.get(node.input[0])
        if gather is None or not is_standard(gather, "Gather") or readers[node.input[0]] > 1:
            continue
        data, places = gather.input
        length = weights.get(shapes[data].input[1]) if data in shapes else None
        if places not in weights or length is None or list(length.dims) != [1]:
            continue
        array = numpy_helper.to_array(weights[places])
        moved = np.ascontiguousarray(array.transpose(permutation(node, array.ndim)))
        name = new_name(f"{node.output[0]}/places", taken)
        graph.initializer.append(numpy_helper.from_array(moved, name))
        gather.input[1], gather.output[0] = name, node.output[0]
        graph.node.remove(node)


def _declared(model: onnx.ModelProto) -> dict[str, TensorType]:
    """The types of inputs and outputs: of what is between them, ORT saves little."""
    ends = onnx.GraphProto(input=model.graph.input, output=model.graph.output)
    return declared_types(ends, model.graph.initializer)


def inferred_by_ort(source: ModelSource, settings: SessionSettings) -> dict[str, TensorType]:
    """What ORT infers of every tensor: onnx knows neither ORT's operators nor other layouts.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    nodes = source.model.graph.node
    part = source.part(
        [node.name for node in nodes],
        [value.name for value in input_values(source.model)],
        [tensor for node in nodes for tensor in node.output if tensor],
    )
    with OrtSession(part, replace(settings, keeps_nodes=True)) as session:
        return session.output_types()


def to_lowered(
    placements: Mapping[str, Placement], portable: onnx.ModelProto, lowered: onnx.ModelProto
) -> dict[str, Placement]:
    """Carry a schedule of the portable model over to the lowered one, in launch order."""
    origin = origins(portable, lowered)
    position = {name: number for number, name in enumerate(placements)}
    known = sorted(origin, key=lambda name: position[origin[name]])
    return _spread(lowered, {name: placements[origin[name]] for name in known})


def to_portable(
    placements: Mapping[str, Placement], portable: onnx.ModelProto, lowered: onnx.ModelProto
) -> dict[str, Placement]:
    """Carry a schedule of the lowered model back to the portable one, in launch order."""
    origin = origins(portable, lowered)
    known: dict[str, Placement] = {}
    for name, placement in placements.items():
        if name in origin:
            known.setdefault(origin[name], placement)
    return _spread(portable, known)


def origins(portable: onnx.ModelProto, lowered: onnx.ModelProto) -> dict[str, str]:
    """For each lowered node that comes from a portable one, the name of that."""
    names = {node.name for node in portable.graph.node}
    found = {}
    for node in lowered.graph.node:
        match = _RENAMED.fullmatch(node.name)
        if node.name in names:
            found[node.name] = node.name
        elif match and match[1] in names:
            found[node.name] = match[1]
    return found


def _spread(model: onnx.ModelProto, known: Mapping[str, Placement]) -> dict[str, Placement]:
    """Place every node, given some in launch order.

    The others go where the chain of operators goes that they are in: beside their only reader, if
    that reads nothing else, for what cuts a piece out of a tensor ends a chain. Else they go
    beside what they read from, else beside what reads them. The order is made topological where a
    fusion has moved an edge.
    """
    nodes = model.graph.node
    reads, readers = _neighbours(nodes)
    position = {name: number for number, name in enumerate(known)}
    found: dict[int, tuple[_Key, Placement]] = {
        i: ((position[node.name], 0, i), known[node.name])
        for i, node in enumerate(nodes)
        if node.name in known
    }
    if not found:
        raise ModelError(
            "ONNX Runtime renames every operator of the model when it changes the layout, so the "
            "schedule can't be carried over; run `onnxsched optimize --no-variants`."
        )

    def put(index: int, side: int, beside: Iterable[int]) -> None:
        """Place a node after the last (side 1) or before the first (-1) of those in place."""
        if index in found:
            return
        if near := [found[other] for other in beside if other in found]:
            (place, _, _), placement = max(near) if side > 0 else min(near)
            found[index] = ((place, side, index), placement)

    for index in reversed(range(len(nodes))):
        if len(readers[index]) == 1 and len(reads[readers[index][0]]) == 1:
            put(index, -1, readers[index])
    for index in range(len(nodes)):
        put(index, 1, reads[index])
    for index in reversed(range(len(nodes))):
        put(index, -1, readers[index])
        put(index, -1, found)
    return {
        nodes[i].name: found[i][1]
        for i in topological([found[i][0] for i in range(len(nodes))], reads)
    }


def _neighbours(nodes: Sequence[onnx.NodeProto]) -> tuple[list[list[int]], list[list[int]]]:
    """For each node those that it reads from, and those that read from it."""
    reads = sources_of(nodes)
    readers: list[list[int]] = [[] for _ in nodes]
    for index, sources in enumerate(reads):
        for source in sources:
            readers[source].append(index)
    return reads, readers
