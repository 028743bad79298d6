"""Models as ONNX Runtime lowers them, channels last, and what they compute node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from onnx import TensorProto, helper, numpy_helper

from onnxsched_runtime.kernels import Computed, FusedConvolution, Kernel, Pool
from onnxsched_runtime.model import FUSED_DOMAIN
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import Variant
from support.models import Array

NHWC_DOMAIN = "com.ms.internal.nhwc"
FUSES = Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic", fuses=True)
Shape = tuple[int, ...]


class Lowered:
    """A lowered model of images `x` that grows operator by operator.

    Its numbers are small integers, so that sums are exact in every order.
    """

    def __init__(self, shape: Shape, seed: int = 0, element_type: int = TensorProto.FLOAT) -> None:
        self.element_type = element_type
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, Shape] = {"x": shape}
        self._rng = np.random.default_rng(seed)

    def store(self, *shape: int) -> str:
        """A new weight; returns its name."""
        array = self._rng.integers(-1, 2, shape)
        dtype = helper.tensor_dtype_to_np_dtype(self.element_type)
        self.weights.append(numpy_helper.from_array(array.astype(dtype), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def add(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """An operator; returns what it writes."""
        name = f"t{len(self.nodes)}"
        self._append(
            helper.make_node(op, inputs, [name], f"{op}_{name}", domain=domain, **attributes)
        )
        return name

    def _append(self, node: onnx.NodeProto) -> None:
        known: dict[str, Array] = {
            t: np.zeros(self.shapes[t]) for t in node.input if t in self.shapes
        } | {weight.name: numpy_helper.to_array(weight) for weight in self.weights}
        self.shapes |= {name: array.shape for name, array in computed(node, known).items()}
        self.nodes.append(node)

    def conv(
        self,
        image: str,
        count: int,
        size: int = 1,
        *,
        bias: bool = True,
        group: int = 1,
        **attributes: Any,
    ) -> str:
        """A convolution to so many channels, which keeps the size unless told otherwise."""
        filters = self.store(count, self.shapes[image][-1] // group, size, size)
        inputs = [image, filters, *([self.store(count)] if bias else [])]
        attributes = {"pads": [size // 2] * 4, "group": group} | attributes
        return self.add("Conv", inputs, NHWC_DOMAIN, **attributes)

    def pool(self, image: str, op: str = "MaxPool", **attributes: Any) -> str:
        """The maxima or averages of neighbours, which keep the size unless told otherwise."""
        attributes = {"kernel_shape": [3, 3], "pads": [1] * 4} | attributes
        return self.add(op, [image], NHWC_DOMAIN, **attributes)

    def reshape(self, tensor: str, *shape: int) -> str:
        """A tensor in another shape."""
        name = f"shape{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        return self.add("Reshape", [tensor, name])

    def cut(self, tensor: str, axis: int, start: int, stop: int) -> str:
        """Part of a tensor."""
        names = [f"bound{len(self.weights) + n}" for n in range(3)]
        for name, value in zip(names, (start, stop, axis), strict=True):
            self.weights.append(numpy_helper.from_array(np.array([value], np.int64), name))
        return self.add("Slice", [tensor, *names])

    def split(self, tensor: str, axis: int, *counts: int) -> list[str]:
        """All of a tensor, in pieces; returns their names."""
        name, sizes = f"t{len(self.nodes)}", f"sizes{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(counts, np.int64), sizes))
        pieces = [f"{name}_{number}" for number in range(len(counts))]
        node = helper.make_node("Split", [tensor, sizes], pieces, f"Split_{name}", axis=axis)
        self._append(node)
        return pieces

    def source(self, *outputs: str) -> ModelSource:
        """The model, as `lower` hands it on."""

        def declared(name: str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, self.element_type, self.shapes[name])

        ends = [declared(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "lowered", [declared("x")], ends, self.weights)
        domains = [helper.make_opsetid("", 17), helper.make_opsetid(NHWC_DOMAIN, 17)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        tensors = {n: TensorType(self.element_type, shape) for n, shape in self.shapes.items()}
        return ModelSource(model, tensors, FUSES, is_lowered=True)


def feeds_for(source: ModelSource, seed: int = 1) -> dict[str, Array]:
    """Images of small integers for a model."""
    kind = source.tensors["x"]
    dtype = helper.tensor_dtype_to_np_dtype(kind.element_type)
    return {"x": np.random.default_rng(seed).integers(-2, 3, kind.shape).astype(dtype)}


def evaluated(source: ModelSource, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of a model, in float64; a node that reads what comes later is an error."""
    graph = source.model.graph
    values = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    values |= {name: array.astype(np.float64) for name, array in feeds.items()}
    for node in graph.node:
        values |= computed(node, values)
    return values


def outputs_of(source: ModelSource, feeds: Mapping[str, Array]) -> list[Array]:
    """What a model computes, in its own type."""
    values = evaluated(source, feeds)
    return [
        values[v.name].astype(helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type))
        for v in source.model.graph.output
    ]


def computed(node: onnx.NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
    """What one node writes."""
    reads = [values[name] if name else None for name in node.input]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Split":
        tensor, sizes = (read for read in reads if read is not None)
        pieces = np.split(tensor, np.cumsum(sizes)[:-1], attributes["axis"])
        return dict(zip(node.output, pieces, strict=True))
    (name,) = node.output
    return {name: _OPERATORS[node.domain, node.op_type](*reads, **attributes)}


def convolved(
    image: Array,
    filters: Array,
    bias: Array | None = None,
    added: Array | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    dilations: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    group: int | None = None,
    rectified: bool | int = False,
) -> Array:
    """A convolution of images channels last with filters in ONNX's order, and what follows it."""
    group = group or image.shape[-1] // filters.shape[1]
    parts = zip(np.split(image, group, -1), np.split(filters, group), strict=True)
    result = np.concatenate([_sums(i, f, strides, dilations, pads) for i, f in parts], -1)
    result += 0 if bias is None else bias
    result += 0 if added is None else added
    return np.maximum(result, 0) if rectified else result


def _sums(
    image: Array,
    filters: Array,
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Array:
    windows = _windows(image, filters.shape[2:], strides, dilations, pads, 0.0)
    return np.asarray(np.einsum("nhwcyx,ocyx->nhwo", windows, filters.astype(np.float64)))


def _max_pooled(
    image: Array,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
    dilations: Sequence[int] = (1, 1),
    count_include_pad: int = 0,
) -> Array:
    assert not count_include_pad
    return pooled_windows(image, kernel_shape, strides, pads, dilations)


def _average_pooled(
    image: Array,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
    dilations: Sequence[int] = (1, 1),
    count_include_pad: int = 0,
) -> Array:
    return pooled_windows(
        image, kernel_shape, strides, pads, dilations,
        averages=True, counts_padding=bool(count_include_pad),
    )  # fmt: skip


def pooled_windows(
    image: Array,
    window: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int] = (1, 1),
    *,
    averages: bool = False,
    counts_padding: bool = False,
) -> Array:
    """The maxima or averages of windows over images channels last."""
    outside = -np.inf if not averages else 0.0 if counts_padding else np.nan
    windows = _windows(image, window, strides, dilations, pads, outside)
    reduced = np.nanmean if averages else np.max
    return np.asarray(reduced(windows, (-2, -1)))


def _windows(
    image: Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    outside: float,
) -> Array:
    """What lies under a window at each of its places: (images, height, width, channels, y, x)."""
    top, left, bottom, right = pads
    around = ((0, 0), (top, bottom), (left, right), (0, 0))
    padded = np.pad(image.astype(np.float64), around, constant_values=outside)
    spans = [(size - 1) * step + 1 for size, step in zip(sizes, dilations, strict=True)]
    found = np.lib.stride_tricks.sliding_window_view(padded, spans, (1, 2))
    return found[:, :: strides[0], :: strides[1], :, :: dilations[0], :: dilations[1]]


def _sliced(value: Array, starts: Array, ends: Array, axes: Array) -> Array:
    where = [slice(None)] * value.ndim
    for start, end, axis in zip(starts, ends, axes, strict=True):
        where[axis] = slice(start, end)
    return value[tuple(where)]


_OPERATORS: Mapping[tuple[str, str], Callable[..., Array]] = {
    (NHWC_DOMAIN, "Conv"): convolved,
    (FUSED_DOMAIN, "Conv"): convolved,
    (NHWC_DOMAIN, "MaxPool"): _max_pooled,
    (FUSED_DOMAIN, "MaxPool"): _max_pooled,
    (NHWC_DOMAIN, "AveragePool"): _average_pooled,
    (FUSED_DOMAIN, "AveragePool"): _average_pooled,
    ("", "Relu"): lambda value: np.maximum(value, 0),
    ("", "Add"): np.add,
    ("", "Concat"): lambda *values, axis: np.concatenate(values, axis),
    ("", "MatMul"): np.matmul,
    ("", "Reshape"): np.reshape,
    ("", "Transpose"): lambda value, perm: np.transpose(value, perm),
    ("", "Slice"): _sliced,
    (FUSED_DOMAIN, "Transpose"): lambda value, perm, starts, stops: np.transpose(
        value[tuple(map(slice, starts, stops))], perm
    ),
    (FUSED_DOMAIN, "Slice"): lambda value, axis, start, stop: np.take(
        value, range(start, stop), axis
    ),
    (FUSED_DOMAIN, "Concat"): lambda *values, axis: np.concatenate(values, axis),
}


@st.composite
def lowered_models(draw: DrawFn, max_steps: int = 7, *, on_cpu: bool = False) -> ModelSource:
    """Random models of convolutions and what may follow them.

    Args:
        draw: Hypothesis.
        max_steps: How many steps they grow in, each of a few operators.
        on_cpu: Only with operators that ORT's CPU provider runs, or that become ours.
    """
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(2, 4)), 2)
    lowered = Lowered(shape, draw(st.integers(0, 2**32)))
    kinds = ["conv", "relu", "add", "concat", "sum", "sum", "inception", "inception", "reshape"]
    kinds += ["pool", "pool", "rows", "split", "bands", "bands", "other order"] + (
        [] if on_cpu else ["grouped", "other form"]
    )
    for _ in range(draw(st.integers(1, max_steps))):
        _grow(draw, lowered, draw(st.sampled_from(kinds)))
    written = [node.output[0] for node in lowered.nodes]
    some = draw(st.lists(st.sampled_from(written), max_size=2))
    return lowered.source(*dict.fromkeys([written[-1], *some]))


def _grow(draw: DrawFn, lowered: Lowered, kind: str) -> None:
    """Add a few operators that read what is there, what was written last more often."""
    images = [t for t, shape in lowered.shapes.items() if len(shape) == 4]
    recent = st.sampled_from([*images, *images[-3:], *images[-1:]])
    image = draw(recent)
    *_, height, width, count = lowered.shapes[image]
    alike = [t for t in images if lowered.shapes[t] == lowered.shapes[image]]
    near = [t for t in images if lowered.shapes[t][:3] == lowered.shapes[image][:3]]

    def conv(read: str, **attributes: Any) -> str:
        """A convolution, with a Relu perhaps."""
        size, bias = draw(st.sampled_from([1, 3])), draw(st.booleans())
        result = lowered.conv(read, count, size, bias=bias, **attributes)
        return lowered.add("Relu", [result]) if draw(st.booleans()) else result

    def branch() -> str:
        """A convolution and what keeps its signs, perhaps."""
        result = lowered.conv(image, 1, bias=draw(st.booleans()))
        return lowered.pool(result) if draw(st.booleans()) else result

    match kind:
        case "conv":
            conv(image)
        case "grouped":
            conv(image, group=count)
        case "other form" if min(height, width) > 1:
            conv(image, strides=[2, 1], dilations=[1, 2], pads=[2, 2, 2, 3])
        case "relu":
            lowered.add("Relu", [image])
        case "pool":
            op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            result = lowered.pool(image, op)
            if draw(st.booleans()):
                lowered.add("Relu", [result])
        case "add":
            lowered.add("Add", [image, draw(st.sampled_from(alike))])
        case "concat" if count < 8:
            lowered.add("Concat", [image, draw(st.sampled_from(near))], axis=3)
        case "sum":
            deep = lowered.conv(lowered.conv(image, 1) if draw(st.booleans()) else image, count)
            others = {
                "image": lambda: image,
                "alike": lambda: draw(st.sampled_from(alike)),
                "later": lambda: lowered.conv(image, count),
                "deeper": lambda: lowered.conv(lowered.conv(image, 1), count),
                "narrow": lambda: lowered.conv(image, 1),
            }
            other = others[draw(st.sampled_from([*others]))]()
            result = lowered.add("Add", draw(st.permutations([deep, other])))
            if draw(st.booleans()):
                result = lowered.add("Add", [result, image])
            if draw(st.booleans()):
                lowered.add("Relu", [result])
        case "inception":
            joined = lowered.add("Concat", [branch() for _ in range(2)], axis=3)
            lowered.add("Relu", [joined])
        case "rows":
            start = draw(st.integers(0, height - 1))
            axis = draw(st.sampled_from([1, 1, 2]))
            stop = draw(st.integers(start + 1, height)) if axis == 1 else width
            lowered.cut(image, axis, start if axis == 1 else 0, stop)
        case "split" if height > 1:
            first = draw(st.integers(1, height - 1))
            pieces = lowered.split(image, 1, first, height - first)
            if draw(st.booleans()):
                pieces = [conv(piece) for piece in pieces]
            lowered.add("Concat", draw(st.permutations(pieces)), axis=1)
        case "bands":
            parts = [draw(recent) for _ in range(draw(st.integers(1, 2)))]
            parts = [t for t in parts if lowered.shapes[t][2:] == (width, count)] + [image]
            parts = [t for t in parts if lowered.shapes[t][0] == lowered.shapes[image][0]]
            if height > 1 and draw(st.booleans()):
                parts += [lowered.cut(image, 1, 0, draw(st.integers(1, height)))]
            if draw(st.booleans()):
                parts = [conv(part) for part in parts]
            few = parts if sum(lowered.shapes[t][1] for t in parts) < 12 else parts[-1:]
            lowered.add("Concat", few, axis=1)
        case "other order":
            swapped = lowered.add("Transpose", [image], perm=[0, 3, 1, 2])
            if count > 1 and draw(st.booleans()):
                swapped = lowered.cut(swapped, 1, 0, count - 1)
            lowered.add("Transpose", [swapped], perm=[0, 2, 3, 1])
        case "reshape":
            flat = lowered.reshape(image, -1, count)
            lowered.add("Relu", [flat])


def convolutions() -> SearchStrategy[FusedConvolution]:
    """Any descriptions of convolutions, whether they make sense or not."""
    four = st.tuples(*[st.integers(1, 99)] * 4)
    pair = st.tuples(*[st.integers(1, 3)] * 2)
    types = st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16])
    flag = st.booleans()
    return st.builds(FusedConvolution, types, four, four, four, pair, pair, four, flag, flag, flag)


def pools() -> SearchStrategy[Pool]:
    """Any descriptions of pools, whether they make sense or not."""
    four = st.tuples(*[st.integers(0, 99)] * 4)
    pair = st.tuples(*[st.integers(1, 3)] * 2)
    types = st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16])
    flag = st.booleans()
    return st.builds(Pool, types, four, four, pair, pair, four, flag, flag)


def kernels() -> SearchStrategy[dict[Computed, Kernel]]:
    """Kernels of a few convolutions and pools."""
    knobs = st.lists(st.tuples(st.integers(0, 60), st.integers(-1, 9)), max_size=3)
    engine = st.tuples(st.integers(-1, 99))
    kernel = st.builds(lambda number, pairs: (number, *pairs), engine, knobs)
    return st.dictionaries(convolutions() | pools(), kernel, max_size=3)
