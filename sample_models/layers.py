"""The building blocks that every sample model is written with.

A `Net` records nodes in the order of the calls, which is therefore a topological order, and
draws every weight from one seeded generator, so that the same calls give the same bytes. It
knows the shape of each tensor, in NCHW for images.
"""

from collections.abc import Iterable, Sequence
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from sample_models.errors import ModelError
from sample_models.windows import ConvSpec, Pads, positions

OPSET = 17
IR_VERSION = 8
SEED = 0

RELU_GAIN = sqrt(2.0)
"""Keeps the second moment of activations where a Relu drops half of it (He et al. 2015)."""


class Net:
    """A graph under construction.

    Every method that adds an operator takes its hierarchical name first, names the node so,
    its result `NAME:0` and its weights `NAME/weight` and so on, and returns the result.

    Args:
        name: Name of the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._rng = np.random.Generator(np.random.PCG64(SEED))
        self._nodes: list[gs.Node] = []
        self._inputs: list[gs.Variable] = []

    def input(self, name: str, shape: Sequence[int], dtype: type = np.float32) -> gs.Variable:
        """Declares an input of the model."""
        tensor = gs.Variable(name, np.dtype(dtype), list(shape))
        self._inputs.append(tensor)
        return tensor

    def constant(self, name: str, values: npt.ArrayLike) -> gs.Constant:
        """Makes a constant that is no parameter; floating point becomes float32."""
        array = np.asarray(values)
        return gs.Constant(name, array.astype(np.float32) if array.dtype.kind == "f" else array)

    def normal(self, name: str, shape: Sequence[int], std: float) -> gs.Constant:
        """Makes a parameter of normally distributed values around zero."""
        values = self._rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(std)
        return gs.Constant(name, values)

    def uniform(self, name: str, shape: Sequence[int], low: float, high: float) -> gs.Constant:
        """Makes a parameter of uniformly distributed values in [low, high)."""
        values = self._rng.random(shape, dtype=np.float32)
        values *= np.float32(high - low)
        values += np.float32(low)
        return gs.Constant(name, values)

    def op(
        self,
        name: str,
        kind: str,
        inputs: Iterable[gs.Tensor],
        shape: Sequence[int],
        dtype: type | None = None,
        **attributes: Any,
    ) -> gs.Variable:
        """Adds one operator with one output.

        Args:
            name: Hierarchical name of the node.
            kind: The ONNX operator.
            inputs: Its inputs, in the operator's order.
            shape: Shape of the output.
            dtype: Element type of the output; that of the first input if None.
            **attributes: The operator's attributes.

        Returns:
            The output.

        Raises:
            ModelError: The output would have no elements.
        """
        if min(shape, default=1) < 1:
            raise ModelError(
                f"the input is too small for {self.name}: {name} would put out the shape "
                f"{'x'.join(map(str, shape))}, so ask for a larger one"
            )
        operands = list(inputs)
        kept = operands[0].dtype if dtype is None else np.dtype(dtype)
        output = gs.Variable(f"{name}:0", kept, list(shape))
        self._nodes.append(gs.Node(kind, name, attributes, operands, [output]))
        return output

    def elementwise(self, name: str, kind: str, *operands: gs.Tensor | float) -> gs.Variable:
        """Applies an operator that broadcasts; a number becomes the constant `NAME/constant`."""
        tensors = [
            self.constant(f"{name}/constant", float(value))
            if isinstance(value, int | float)
            else value
            for value in operands
        ]
        shape = np.broadcast_shapes(*(tuple(tensor.shape) for tensor in tensors))
        return self.op(name, kind, tensors, shape)

    def relu(self, name: str, x: gs.Tensor) -> gs.Variable:
        """Clips at zero from below."""
        return self.elementwise(name, "Relu", x)

    def add(self, name: str, left: gs.Tensor, right: gs.Tensor) -> gs.Variable:
        """Adds two tensors."""
        return self.elementwise(name, "Add", left, right)

    def conv(
        self,
        name: str,
        x: gs.Tensor,
        spec: ConvSpec,
        *,
        groups: int = 1,
        bias: bool = False,
        gain: float = RELU_GAIN,
    ) -> gs.Variable:
        """Convolves [N, C, H, W] to [N, spec.channels, H', W'].

        Args:
            name: Hierarchical name of the node.
            x: The image.
            spec: Channels, window, stride and padding.
            groups: Number of groups; the channels of x for a depthwise convolution.
            bias: Whether it adds a bias itself (no BatchNormalization follows).
            gain: How much larger the output is than the input, in standard deviations.
        """
        batch, channels, *image = x.shape
        window = (channels // groups, *spec.window)
        weights = [
            self.normal(f"{name}/weight", (spec.channels, *window), gain / sqrt(prod(window)))
        ]
        if bias:
            weights.append(self.normal(f"{name}/bias", (spec.channels,), 0.1))
        shape = (batch, spec.channels, *positions(image, spec.window, spec.stride, spec.pads))
        return self.op(
            name,
            "Conv",
            [x, *weights],
            shape,
            dilations=[1, 1],
            group=groups,
            kernel_shape=list(spec.window),
            pads=list(spec.pads),
            strides=[spec.stride] * 2,
        )

    def batch_norm(self, name: str, x: gs.Tensor) -> gs.Variable:
        """Normalises each channel by statistics such as training would have left."""
        channels = (x.shape[1],)
        statistics = (
            self.uniform(f"{name}/weight", channels, 0.75, 1.25),
            self.normal(f"{name}/bias", channels, 0.1),
            self.normal(f"{name}/running_mean", channels, 0.1),
            self.uniform(f"{name}/running_var", channels, 0.75, 1.25),
        )
        return self.op(name, "BatchNormalization", [x, *statistics], x.shape, epsilon=1e-3)

    def conv_bn_relu(self, name: str, x: gs.Tensor, spec: ConvSpec) -> gs.Variable:
        """Convolves, normalises and clips: `NAME/conv`, `NAME/bn`, `NAME/relu`."""
        x = self.conv(f"{name}/conv", x, spec)
        x = self.batch_norm(f"{name}/bn", x)
        return self.relu(f"{name}/relu", x)

    def max_pool(
        self,
        name: str,
        x: gs.Tensor,
        kernel: int,
        stride: int,
        pad: int = 0,
        *,
        round_up: bool = False,
    ) -> gs.Variable:
        """Takes the maximum of each window; `round_up` lets the last one hang over the edge."""
        return self._pool(
            name, "MaxPool", x, kernel, stride, pad, round_up, ceil_mode=int(round_up)
        )

    def average_pool(
        self,
        name: str,
        x: gs.Tensor,
        kernel: int,
        stride: int,
        pad: int = 0,
        *,
        count_pad: bool = False,
    ) -> gs.Variable:
        """Takes the mean of each window; `count_pad` counts the padding as zeros in it."""
        return self._pool(
            name, "AveragePool", x, kernel, stride, pad, False, count_include_pad=int(count_pad)
        )

    def _pool(
        self,
        name: str,
        kind: str,
        x: gs.Tensor,
        kernel: int,
        stride: int,
        pad: int,
        round_up: bool,
        **attributes: Any,
    ) -> gs.Variable:
        window = (kernel, kernel)
        pads: Pads = (pad, pad, pad, pad)
        image = positions(x.shape[2:], window, stride, pads, round_up)
        return self.op(
            name,
            kind,
            [x],
            (*x.shape[:2], *image),
            kernel_shape=list(window),
            pads=list(pads),
            strides=[stride] * 2,
            **attributes,
        )

    def global_average_pool(self, name: str, x: gs.Tensor) -> gs.Variable:
        """Averages each channel of [N, C, H, W] and drops the image: `NAME`, `NAME/flatten`."""
        pooled = self.op(name, "GlobalAveragePool", [x], (*x.shape[:2], 1, 1))
        return self.op(f"{name}/flatten", "Flatten", [pooled], x.shape[:2], axis=1)

    def concat(self, name: str, parts: Sequence[gs.Tensor], axis: int = 1) -> gs.Variable:
        """Joins tensors along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.op(name, "Concat", parts, shape, axis=axis)

    def gemm(self, name: str, x: gs.Tensor, features: int, gain: float = 1.0) -> gs.Variable:
        """Applies a fully connected layer to [N, K]: weights [features, K] and a bias."""
        weight = self.normal(f"{name}/weight", (features, x.shape[1]), gain / sqrt(x.shape[1]))
        bias = self.normal(f"{name}/bias", (features,), 0.1)
        return self.op(name, "Gemm", [x, weight, bias], (x.shape[0], features), transB=1)

    def model(self, **outputs: gs.Variable) -> onnx.ModelProto:
        """Ends the construction.

        Args:
            **outputs: The model's outputs by their names.

        Returns:
            The model.
        """
        for name, tensor in outputs.items():
            tensor.name = name
        graph = gs.Graph(
            self._nodes,
            self._inputs,
            list(outputs.values()),
            name=self.name,
            opset=OPSET,
            producer_name="sample_models",
            ir_version=IR_VERSION,
        )
        model: onnx.ModelProto = gs.export_onnx(graph)
        return model
