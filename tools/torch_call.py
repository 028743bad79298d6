"""What a lowering from ONNX to torch knows of its node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import helper

from onnxsched_runtime.errors import ModelError

Lowering = Callable[..., Any]
"""From a `Call` and its operands (None where left out) to the output, or a tuple of them.

Run up to three times on the same arguments: on `meta` tensors for the shape, on fx proxies for the
graph, and on real tensors where all operands are constants.
"""


@dataclass(frozen=True)
class Call:
    """One node, without the values that flow into it."""

    name: str
    op_type: str
    opset: int
    attributes: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    """Of each operand; () where it is left out."""
    dtype: torch.dtype
    """Of the first operand."""
    constants: tuple[torch.Tensor | None, ...]
    """The operands whose values are known."""
    omitted: frozenset[int]
    """Positions of operands that are left out."""
    output_count: int

    def get(self, name: str, default: Any) -> Any:
        """An attribute, strings decoded."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def integers(self, position: int) -> list[int] | None:
        """The values of an operand that has to be constant; None where it is left out.

        Raises:
            ModelError: It is not constant.
        """
        if position >= len(self.constants) or position in self.omitted:
            return None
        if (value := self.constants[position]) is None:
            raise self.refusal(f"input {position} known only in a run")
        return [int(item) for item in value.flatten().tolist()]

    def axes(self) -> list[int] | None:
        """Axes from the attribute of old opsets or from input 1; None where there are none."""
        axes = self.get("axes", None)
        return self.integers(1) if axes is None else list(axes)

    def refusal(self, what: str) -> ModelError:
        """The error for a node that has something torch is not asked to run."""
        return ModelError(
            f"Operator '{self.name}' is a {self.op_type} with {what}, which the torch peer does "
            "not support; leave the torch arms out for this model."
        )


def torch_type(element_type: int) -> torch.dtype:
    """The torch type of an ONNX element type that numpy has too."""
    found: torch.dtype = getattr(torch, helper.tensor_dtype_to_np_dtype(element_type).name)
    return found
