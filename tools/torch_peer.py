"""A model of the zoo as a torch module: the same operators, one for one, with the same weights.

The module is a `torch.fx.GraphModule` of static shapes, so that `torch.compile` sees one clean
graph; what only depends on constants is computed when it is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.model import STANDARD_DOMAINS, input_values, is_standard
from tools.torch_call import Call, Lowering, torch_type
from tools.torch_operators import LOWERINGS, SCALAR_OPERANDS


@dataclass(frozen=True)
class TorchModel:
    """A torch module and how it is called."""

    module: fx.GraphModule
    """Takes the inputs in order and returns a tuple of the outputs in order."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Flowing:
    """A tensor that a run computes."""

    proxy: Any
    meta: torch.Tensor
    """Without values: what shape and type it has."""


_Value = torch.Tensor | _Flowing
"""A constant is a tensor on the CPU."""


def torch_model(model: onnx.ModelProto) -> TorchModel:
    """Rebuild a model in torch.

    Args:
        model: Of static shapes, its nodes in topological order; not yet fused.

    Returns:
        The module on the CPU, none of its weights requiring a gradient. O(nodes + weights).

    Raises:
        ModelError: It holds an operator that is not supported.
    """
    builder = _Builder(model)
    for value in input_values(model):
        builder.add_input(value)
    for node in model.graph.node:
        builder.add_node(node)
    outputs = tuple(value.name for value in model.graph.output)
    module = builder.finish(outputs)
    return TorchModel(module, tuple(value.name for value in input_values(model)), outputs)


class _Builder:
    """An fx graph under construction."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = fx.Graph()
        self._tracer = fx.proxy.GraphAppendingTracer(self._graph)
        self._opset = next(o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS)
        self._values: dict[str, _Value] = {
            weight.name: torch.from_numpy(np.array(numpy_helper.to_array(weight)))
            for weight in model.graph.initializer
        }
        self._weights: dict[str, torch.Tensor] = {}
        self._taken: set[str] = set()
        self._proxy_of: dict[str, Any] = {}
        declared = (*model.graph.value_info, *model.graph.output)
        self._declared = {value.name: value.type.tensor_type for value in declared}

    def add_input(self, value: onnx.ValueInfoProto) -> None:
        """Make an input of the model an argument."""
        kind = value.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        meta = torch.empty(shape, dtype=torch_type(kind.elem_type), device="meta")
        node = self._graph.placeholder(self._unused(value.name))
        self._values[value.name] = _Flowing(fx.Proxy(node, self._tracer), meta)

    def add_node(self, node: onnx.NodeProto) -> None:
        """Add a node: fold it if all it reads is known, else record the calls it is made of."""
        lower = LOWERINGS.get(node.op_type) if is_standard(node) else None
        if lower is None:
            raise ModelError(
                f"Operator '{node.name}' is a {node.op_type}, which the torch peer does not "
                "support; leave the torch arms out for this model."
            )
        operands = [self._values[name] if name else None for name in node.input]
        call = self._call(node, operands)
        try:
            found = self._lowered(call, lower, list(node.input), operands)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise call.refusal(f"what torch refuses ({reason})") from error
        if len(found) != len(node.output):
            raise call.refusal(f"{len(node.output)} outputs")
        for name, value in zip(node.output, found, strict=True):
            self._check(call, name, value)
            self._values[name] = value

    def finish(self, outputs: Sequence[str]) -> fx.GraphModule:
        """The module."""
        ends = [self._operand(None, name, self._values[name], False) for name in outputs]
        self._graph.output(tuple(end.node for end in ends))
        self._graph.eliminate_dead_code()
        self._graph.lint()
        return fx.GraphModule(self._weights, self._graph).eval()

    def _lowered(
        self,
        call: Call,
        lower: Lowering,
        names: Sequence[str],
        operands: Sequence[_Value | None],
    ) -> list[_Value]:
        """The outputs of a node: constants if all operands are, else recorded."""
        if not any(isinstance(operand, _Flowing) for operand in operands):
            return [tensor.contiguous() for tensor in _listed(lower(call, *operands))]
        named = list(zip(names, operands, strict=True))
        metas = lower(call, *(self._operand(call, name, o, True) for name, o in named))
        proxies = lower(call, *(self._operand(call, name, o, False) for name, o in named))
        pairs = zip(_listed(proxies), _listed(metas), strict=True)
        return [_Flowing(proxy, meta) for proxy, meta in pairs]

    def _call(self, node: onnx.NodeProto, operands: Sequence[_Value | None]) -> Call:
        known = [None if o is None else _tensor(o) for o in operands]
        return Call(
            name=node.name,
            op_type=node.op_type,
            opset=self._opset,
            attributes={a.name: helper.get_attribute_value(a) for a in node.attribute},
            shapes=tuple(() if tensor is None else tuple(tensor.shape) for tensor in known),
            dtype=next((tensor.dtype for tensor in known if tensor is not None), torch.float32),
            constants=tuple(o if isinstance(o, torch.Tensor) else None for o in operands),
            omitted=frozenset(i for i, o in enumerate(operands) if o is None),
            output_count=len(node.output),
        )

    def _operand(self, call: Call | None, name: str, value: _Value | None, as_meta: bool) -> Any:
        """What a lowering is given for an operand."""
        if isinstance(value, _Flowing):
            return value.meta if as_meta else value.proxy
        if value is None:
            return None
        if call is not None and call.op_type in SCALAR_OPERANDS and value.ndim == 0:
            return value.item()
        if as_meta:
            return value.to("meta")
        return self._weight(name, value)

    def _weight(self, name: str, value: torch.Tensor) -> Any:
        """A constant as a parameter of the module, or a buffer where it holds no floats."""
        if name not in self._proxy_of:
            attribute = self._unused(name)
            is_parameter = value.is_floating_point()
            self._weights[attribute] = (
                torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
            )
            self._proxy_of[name] = fx.Proxy(self._graph.get_attr(attribute), self._tracer)
        return self._proxy_of[name]

    def _unused(self, name: str) -> str:
        """A Python name for a tensor that no other has."""
        stem = re.sub(r"\W", "_", f"t_{name}")
        number, found = 1, stem
        while found in self._taken:
            number, found = number + 1, f"{stem}_{number}"
        self._taken.add(found)
        return found

    def _check(self, call: Call, name: str, value: _Value) -> None:
        """Compare with what the model declares of an output: padding rules differ in corners."""
        if name not in self._declared:
            return
        kind, tensor = self._declared[name], _tensor(value)
        shape = [dim.dim_value for dim in kind.shape.dim]
        if tensor.dtype != torch_type(kind.elem_type) or (
            kind.HasField("shape") and 0 not in shape and shape != list(tensor.shape)
        ):
            raise call.refusal(f"an output that torch makes {list(tensor.shape)}, not {shape}")


def _tensor(value: _Value) -> torch.Tensor:
    return value.meta if isinstance(value, _Flowing) else value


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, tuple) else [found]
