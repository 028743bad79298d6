"""Random models of image operators, and how to cut them into bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import TensorProto, helper, numpy_helper

from onnxsched.loading import Model
from onnxsched.pad_fusion import is_behind_pad
from support.optimizing import as_it_is

CHANNELS = 2
AUTO_PADS = ("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
Groups = list[list[str]]


class Stack:
    """A random model of image operators under construction, each of which reads any before it."""

    def __init__(self, draw: DrawFn, *, is_exact: bool) -> None:
        self.draw = draw
        self.is_exact = is_exact
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {
            "x": (
                draw(st.sampled_from([1, 1, 2])),
                CHANNELS,
                draw(st.integers(6, 24)),
                draw(st.integers(5, 8)),
            ),
        }

    def weight(self, *shape: int) -> str:
        drawn = self.rng.integers(-1, 2, shape) if self.is_exact else self.rng.normal(size=shape)
        self.weights.append(
            numpy_helper.from_array(drawn.astype(np.float32), f"w{len(self.weights)}")
        )
        return str(self.weights[-1].name)

    def add(self, kind: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> None:
        number = len(self.nodes)
        self.nodes.append(
            helper.make_node(kind, inputs, [f"t{number}"], f"n{number}", **attributes)
        )
        self.shapes[f"t{number}"] = shape

    def window(self, sizes: tuple[int, ...], *, is_pool: bool) -> tuple[dict[str, Any], list[int]]:
        """Attributes of a random window, and the size of what it makes of an image."""
        draw = self.draw
        auto = "NOTSET" if is_pool else draw(st.sampled_from([*AUTO_PADS]))
        columns: dict[str, list[int]] = {"kernel_shape": [], "strides": [], "dilations": []}
        begins, ends, made = [], [], []
        for size in sizes:
            kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
            # ONNX Runtime does not dilate with SAME.
            dilation = 1 if is_pool or auto.startswith("SAME") else draw(st.integers(1, 2))
            for column, number in zip(columns.values(), (kernel, stride, dilation), strict=True):
                column.append(number)
            span = (kernel - 1) * dilation + 1
            most = span - 1 if is_pool else span
            begin, end = (draw(st.integers(0, most)) for _ in range(2))
            begins.append(begin)
            ends.append(end)
            if auto.startswith("SAME"):
                made.append(-(-size // stride))
            else:
                padding = begin + end if auto == "NOTSET" else 0
                made.append((size + padding - span) // stride + 1)
        given = {"pads": begins + ends} if auto == "NOTSET" else {"auto_pad": auto}
        return {**columns, **given}, made

    def grow(self) -> None:
        draw, source = self.draw, self.draw(st.sampled_from([*self.shapes]))
        batch, channels, height, width = shape = self.shapes[source]
        kinds = ["Conv", "Conv", "MaxPool", "Relu", "Add", "Mul", "Concat", "Pad", "Slice"]
        kinds += [] if self.is_exact else ["AveragePool", "BatchNormalization", "Clip"]
        kind = draw(st.sampled_from(kinds))
        peers = [name for name, other in self.shapes.items() if other == shape]
        if kind == "Conv":
            attributes, sizes = self.window((height, width), is_pool=False)
            if min(sizes) < 1:
                return
            group = draw(st.sampled_from([1, channels]))
            weight = self.weight(CHANNELS * group, channels // group, *attributes["kernel_shape"])
            bias = [self.weight(CHANNELS * group)] if draw(st.booleans()) else []
            made = (batch, CHANNELS * group, *sizes)
            if group > 2:
                return
            self.add(kind, [source, weight, *bias], made, group=group, **attributes)
        elif kind.endswith("Pool"):
            attributes, sizes = self.window((height, width), is_pool=True)
            del attributes["dilations"]
            if min(sizes) < 1:
                return
            if kind == "AveragePool":
                attributes["count_include_pad"] = draw(st.integers(0, 1))
            elif draw(st.booleans()) and (more := rounded_up((height, width), attributes)):
                attributes["ceil_mode"], sizes = 1, more
            self.add(kind, [source], (batch, channels, *sizes), **attributes)
        elif kind == "Add":
            self.add(kind, [source, draw(st.sampled_from(peers))], shape)
        elif kind == "Mul":
            dims = draw(
                st.sampled_from([(), (width,), (1, 1), (channels, 1, 1), (1, 1, 1, width)])
            )
            self.add(kind, [source, self.weight(*dims)][:: draw(st.sampled_from([1, -1]))], shape)
        elif kind == "Concat":
            joined = [source, *draw(st.lists(st.sampled_from(peers), max_size=2))]
            made = (batch, channels * len(joined), height, width)
            if made[1] <= 6:
                self.add(kind, joined, made, axis=draw(st.sampled_from([1, -3])))
        elif kind == "Pad":
            pads = draw(st.lists(st.integers(-2, 3), min_size=4, max_size=4))
            images = draw(st.sampled_from([0, 0, 0, 1]))
            made = (
                batch + images,
                channels,
                height + pads[0] + pads[2],
                width + pads[1] + pads[3],
            )
            if min(made) < 1:
                return
            stored = self.stored([images, 0, *pads[:2], 0, 0, *pads[2:]])
            self.add(kind, [source, stored], made)
            # A second reader, or ONNX Runtime makes padding of a pool of it that the pool refuses.
            self.add("Abs", [self.nodes[-1].output[0]], made)
        elif kind == "Slice":
            self.crop(source)
        elif kind == "BatchNormalization":
            parts = [self.weight(channels) for _ in range(3)]
            self.weights.append(
                numpy_helper.from_array(np.ones(channels, np.float32), f"w{len(self.weights)}")
            )
            self.add(kind, [source, *parts, self.weights[-1].name], shape)
        else:
            self.add(kind, [source], shape)

    def crop(self, source: str) -> None:
        """Leave out rows, columns or both, with bounds counted from either end."""
        draw, shape = self.draw, list(self.shapes[source])
        axes = draw(st.sampled_from([[2], [3], [2, 3], [3, 2], [-2], [-1, -2]]))
        starts, ends = [], []
        for axis in axes:
            size = shape[axis]
            start = draw(st.integers(0, size - 1))
            end = draw(st.integers(start + 1, size))
            shape[axis] = end - start
            starts.append(start - draw(st.sampled_from([0, size])))
            ends.append(draw(st.sampled_from([end, end - size])) if end < size else 2**31 - 1)
        stored = [self.stored(numbers) for numbers in (starts, ends, axes)]
        self.add("Slice", [source, *stored], tuple(shape))

    def stored(self, numbers: list[int]) -> str:
        """A weight of whole numbers."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def model(self) -> Model:
        read = {name for node in self.nodes for name in node.input}
        ends = [name for name in self.shapes if name not in read and name != "x"]
        extra = self.draw(st.lists(st.sampled_from([*self.shapes][1:]), max_size=1))
        outputs = list(dict.fromkeys([*ends, *extra]))
        value = {
            name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.shapes.items()
        }
        graph = helper.make_graph(
            self.nodes, "stack", [value["x"]], [value[name] for name in outputs], self.weights,
            value_info=[value[name] for name in self.shapes if name not in (*outputs, "x")],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(proto, full_check=True)
        return as_it_is(proto)


def rounded_up(sizes: tuple[int, ...], window: dict[str, Any]) -> list[int] | None:
    """What a pool with `ceil_mode` makes of an image; None where a window starts behind it.

    Whether that window counts onnx and ONNX Runtime do not agree on.
    """
    pads, made = window["pads"], []
    for axis, (size, kernel, stride) in enumerate(
        zip(sizes, window["kernel_shape"], window["strides"], strict=True)
    ):
        begin, end = pads[axis], pads[axis + len(sizes)]
        made.append(-(-(size + begin + end - kernel) // stride) + 1)
        if (made[-1] - 1) * stride >= size + begin:
            return None
    return made


@st.composite
def cut_stacks(draw: DrawFn, *, is_exact: bool) -> tuple[Model, Groups, int]:
    """A model, groups of its operators, and a count of bands that its images have rows for.

    Pools behind a Pad are in no group.
    """
    stack = Stack(draw, is_exact=is_exact)
    stack.add("Relu", ["x"], stack.shapes["x"])
    for _ in range(draw(st.integers(1, 7))):
        stack.grow()
    count = draw(st.integers(1, 4))
    groups: Groups = [[] for _ in range(draw(st.integers(1, 3)))]
    writers = {node.output[0]: node for node in stack.nodes}
    for node in stack.nodes:
        number = draw(st.integers(-1 if draw(st.booleans()) else 0, len(groups) - 1))
        is_left = node.op_type.endswith("Pool") and is_behind_pad(node, writers)
        if number >= 0 and not is_left and stack.shapes[node.output[0]][2] >= count:
            groups[number].append(node.name)
    return stack.model(), groups, count
