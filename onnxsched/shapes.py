"""Shapes: those the user binds inputs to, then the type of every tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import helper

from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.model import declared_types, input_values, is_fixed, node_reads
from onnxsched_runtime.tensor import TensorType, fits_no_memory

_COUNTING = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}
"""Operators whose results are as long as they find things."""
_VALUE_COUNT = 128
"""Initializers of more elements hold weights, not shapes: inference does without their values."""


def parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Read `NAME:1x3x224x224` options.

    Raises:
        UsageError: An option is not of that form.
    """
    shapes = {}
    for text in texts:
        match = re.fullmatch(r"(.+):(\d{1,15}(?:x\d{1,15})*|scalar)", text)
        if match is None:
            raise UsageError(f"--shape {text} can't be read: write NAME:1x3x224x224.")
        if match[1] in shapes:
            raise UsageError(f"--shape gives '{match[1]}' twice; give each input once.")
        dims = () if match[2] == "scalar" else tuple(int(dim) for dim in match[2].split("x"))
        shapes[match[1]] = dims
    return shapes


def bind_shapes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give every input the static shape asked for, in place.

    A symbol bound through one input is bound in all others.

    Raises:
        UsageError: A shape names no input, contradicts the model or another shape, leaves a
            dimension without a value, or is larger than any memory.
    """
    inputs = {value.name: value for value in input_values(model)}
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
            if not is_fixed(dim) and dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
            elif not is_fixed(dim):
                unbound.append(f"{name}[{axis}]" + (f" ('{dim.dim_param}')" * bool(dim.dim_param)))
        if not value.type.tensor_type.HasField("shape"):
            unbound.append(f"{name} (of unknown rank)")
        _require_size(name, value)
    if unbound:
        raise UsageError(
            f"These dimensions have no value: {', '.join(unbound)}; give each input its shape "
            "with --shape NAME:1x3x224x224."
        )
    _forget_shapes(model)


def _bind(
    name: str, value: onnx.ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int]
) -> None:
    kind = value.type.tensor_type
    dims = list(kind.shape.dim)
    if kind.HasField("shape") and len(dims) != len(shape):
        raise UsageError(f"--shape gives '{name}' {len(shape)} dimensions, it has {len(dims)}.")
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=False)):
        fixed = dim.dim_value if is_fixed(dim) else symbols.get(dim.dim_param)
        if fixed is not None and fixed != size:
            raise UsageError(f"--shape gives {name}[{axis}] {size}, but it is {fixed}.")
        if dim.dim_param:
            symbols[dim.dim_param] = size
    del kind.shape.dim[:]
    for size in shape:
        kind.shape.dim.add().dim_value = size


def _require_size(name: str, value: onnx.ValueInfoProto) -> None:
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if fits_no_memory(shape):
        raise UsageError(
            f"Input '{name}' of shape {shape} fits into no memory; give a smaller one."
        )


def _forget_shapes(model: onnx.ModelProto) -> None:
    """Drop the shapes that inference now finds from those of the inputs, and all wrong ones.

    These have symbols, or sizes that an operator counts. What is declared between operators goes
    for good where inference contradicts any of it: the model was changed after its shapes were
    written, and ORT believes its inputs.
    """
    declared = take_declarations(model)
    inferred = _inferred(_without_weights(model))
    found = {value.name: _sizes(value) for value in (*inferred.output, *inferred.value_info)}
    counted = _counted(model)

    def is_open(value: onnx.ValueInfoProto) -> bool:
        is_counted = value.name in counted and None in (found.get(value.name) or ())
        return _has_symbol(value) or is_counted

    put_back(
        model,
        [value for value in declared if not is_open(value)],
        {name: sizes for name, sizes in found.items() if sizes is not None},
    )


def _counted(model: onnx.ModelProto) -> set[str]:
    """The tensors whose sizes may be what an operator counts in the data."""
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _COUNTING or not found.isdisjoint(node_reads(node)):
            found.update(node.output)
    return found


def take_declarations(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What the model declares between operators and of its outputs, taken out of it.

    Outputs stay, as tensors without a shape.
    """
    graph = model.graph
    taken = [*onnx.GraphProto(value_info=[*graph.value_info, *graph.output]).value_info]
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return taken


def put_back(
    model: onnx.ModelProto,
    declared: Iterable[onnx.ValueInfoProto],
    found: Mapping[str, Sequence[int | None]],
) -> None:
    """Declare again what nothing contradicts, in place.

    Args:
        model: A model of `take_declarations`.
        declared: What was taken.
        found: Sizes that are known otherwise; None for one that is not.
    """
    outputs = {value.name: value for value in model.graph.output}
    between, are_stale = [], False
    for value in declared:
        known, own = found.get(value.name), _sizes(value)
        is_stale = known is not None and own is not None and not _agree(own, known)
        if value.name not in outputs:
            between.append(value)
            are_stale |= is_stale
        elif not is_stale:
            outputs[value.name].CopyFrom(value)
    if not are_stale:
        model.graph.value_info.extend(between)


def _agree(one: Sequence[int | None], other: Sequence[int | None]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _sizes(value: onnx.ValueInfoProto) -> list[int | None] | None:
    """The sizes that are declared, None for one that is not fixed; None where the rank is open."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [dim.dim_value if is_fixed(dim) else None for dim in kind.shape.dim]


def declare_output_shapes(model: onnx.ModelProto, declared: Iterable[onnx.ValueInfoProto]) -> None:
    """Give outputs without all of their sizes the shapes that they were declared with."""
    shapes = {
        value.name: value.type.tensor_type.shape
        for value in declared
        if value.type.tensor_type.HasField("shape")
    }
    for value in model.graph.output:
        if value.name in shapes and None in (_sizes(value) or [None]):
            value.type.tensor_type.shape.CopyFrom(shapes[value.name])


def _has_symbol(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ()
    return not all(map(is_fixed, dims))


def declare_types(model: onnx.ModelProto) -> None:
    """Write the types that onnx infers into the model, in place.

    ORT carries them over to the operators that it fuses, of which onnx knows nothing; tensors
    that the model does not declare it leaves undeclared.
    """
    inferred = _inferred(_without_weights(model))
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.value_info)


def tensor_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    """The type of every tensor of the main graph that is not a weight.

    What the model does not declare is inferred. Sequences and optionals have no entry.
    """
    return declared_types(_inferred(_without_weights(model)), model.graph.initializer)


def _inferred(light: onnx.ModelProto) -> onnx.GraphProto:
    return onnx.shape_inference.infer_shapes(light, data_prop=True).graph


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large initializers as typed inputs, so that it copies quickly."""
    graph = model.graph
    heavy = [w for w in graph.initializer if math.prod(w.dims) > _VALUE_COUNT]
    names = {weight.name for weight in heavy}
    light = onnx.GraphProto(name=graph.name, node=graph.node, value_info=graph.value_info)
    light.initializer.extend(w for w in graph.initializer if w.name not in names)
    light.input.extend(v for v in graph.input if v.name not in names)
    light.input.extend(
        helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in heavy
    )
    light.output.extend(graph.output)
    return helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)
