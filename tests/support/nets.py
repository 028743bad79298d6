"""Image models that grow operator by operator, for tests of rewrites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsched.loading import Model
from support.optimizing import as_it_is

Shape = tuple[int, int, int, int]


@dataclass
class Net:
    """A model of images `x`, of which every tensor is `[batch, channels, size, size]`."""

    shape: Shape
    """Of the images that it reads."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.shapes["x"] = self.shape

    def store(self, *shape: int) -> str:
        """A new weight; returns its name."""
        name = f"w{len(self.weights)}"
        array = self.rng.uniform(-1, 1, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(
        self,
        op: str,
        *inputs: str,
        count: int | None = None,
        size: int | None = None,
        **attributes: Any,
    ) -> str:
        """An operator that keeps channels and size unless they are given; returns its result."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{name}", **attributes))
        batch, channels, height, width = self.shapes[inputs[0]]
        sizes = (height, width) if size is None else (size, size)
        self.shapes[name] = (batch, channels if count is None else count, *sizes)
        return name

    def conv(self, x: str, count: int, kernel: int = 1, group: int = 1, bias: bool = True) -> str:
        """A convolution to so many channels that keeps the size; returns its result."""
        inputs = [x, self.store(count, self.shapes[x][1] // group, kernel, kernel)]
        inputs += [self.store(count)] if bias else []
        return self.add("Conv", *inputs, count=count, pads=[kernel // 2] * 4, group=group)

    def alike(self, x: str) -> list[str]:
        """All tensors of the same shape."""
        return [name for name, shape in self.shapes.items() if shape == self.shapes[x]]

    def model(self, *outputs: str) -> Model:
        """The model; what nothing reads is an output too."""
        value = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.shapes.items()
        }
        read = {name for node in self.nodes for name in node.input}
        ends = dict.fromkeys([*outputs, *(n for n in self.shapes if n not in read and n != "x")])
        graph = helper.make_graph(
            self.nodes, "net", [value["x"]], [value[name] for name in ends], self.weights,
            value_info=[value[name] for name in self.shapes if name not in (*ends, "x")],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17)]
        return as_it_is(helper.make_model(graph, opset_imports=opsets, ir_version=10))
