"""Small models, most of them ONNX text, and what plain ONNX Runtime says about any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched_runtime.annotation import Annotation, write_annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.tensor import TensorType

Array = npt.NDArray[Any]

CPU = Device("cpu")


def model_of(text: str, **weights: Array) -> onnx.ModelProto:
    """A checked model with inferred types and named nodes.

    The IR version and the opset are set here: ONNX Runtime refuses onnx's defaults.
    """
    head = '<ir_version: 10, opset_import: ["" : 17]>'
    model = onnx.parser.parse_model(f"{head} small {text}")
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()
    )
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def weight(*shape: int) -> Array:
    """A weight that is the same in every call."""
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def chain() -> onnx.ModelProto:
    return model_of(
        "(float[2,3] x) => (float[2,3] y) { a = Relu(x)  b = Add(a, bias)  y = Neg(b) }",
        bias=weight(3),
    )


def diamond() -> onnx.ModelProto:
    return model_of(
        """(float[2,3] x) => (float[2,3] y) {
            top = Neg(x)
            left = Relu(top)
            right = Sigmoid(top)
            y = Add(left, right)
        }"""
    )


def fork_join() -> onnx.ModelProto:
    """Convolutions side by side, as in an inception block."""
    return model_of(
        """(float[1,3,6,6] x) => (float[1,8,6,6] y) {
            stem = Conv<pads = [1,1,1,1]>(x, w_stem)
            a = Conv(stem, w_a)
            b0 = Conv(stem, w_b0)
            b = Conv<pads = [1,1,1,1]>(b0, w_b1)
            c0 = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>(stem)
            c = Conv(c0, w_c)
            joined = Concat<axis = 1>(a, b, c)
            y = Relu(joined)
        }""",
        w_stem=weight(4, 3, 3, 3),
        w_a=weight(2, 4, 1, 1),
        w_b0=weight(3, 4, 1, 1),
        w_b1=weight(4, 3, 3, 3),
        w_c=weight(2, 4, 1, 1),
    )


def two_towers() -> onnx.ModelProto:
    return model_of(
        """(float[2,3] left, float[4] right) => (float[2,3] p, float[4] q) {
            l = Relu(left)
            r = Neg(right)
            mean = ReduceMean<keepdims = 0>(r)
            p = Mul(l, mean)
            q = Sigmoid(r)
        }"""
    )


def branch() -> onnx.ModelProto:
    """An If whose branches read tensors and a weight of the main graph."""
    return model_of(
        """(bool flag, float[3] x) => (float[3] y) {
            a = Relu(x)
            b = Neg(x)
            c = If(flag) <
                then_branch = yes () => (float[3] u) { u = Add(a, bias) },
                else_branch = no () => (float[3] v) { inner = Mul(a, b)  v = Add(inner, x) }
            >
            y = Sigmoid(c)
        }""",
        bias=weight(3),
    )


def loop() -> onnx.ModelProto:
    """A Loop that adds a captured tensor as often as an input says."""
    return model_of(
        """(int64 count, float[3] x) => (float[3] y) {
            step = Relu(x)
            true = Constant<value = bool {1}>()
            sum = Loop(count, true, x) <
                body = body (int64 i, bool go, float[3] before) => (bool on, float[3] after) {
                    on = Identity(go)
                    after = Add(before, step)
                }
            >
            y = Neg(sum)
        }"""
    )


def sequence() -> onnx.ModelProto:
    """Sequences between operators, and one that leaves the model."""
    return model_of(
        """(float[2,3] x, int64 index) => (float[2,3] y, float[rows,3] z, seq(float[2,3]) parts) {
            a = Relu(x)
            b = Neg(x)
            parts = SequenceConstruct(a, b)
            y = SequenceAt(parts, index)
            hidden = SequenceConstruct(b, a)
            all = ConcatFromSequence<axis = 0>(hidden)
            z = Sigmoid(all)
        }"""
    )


def data_dependent() -> onnx.ModelProto:
    """Shapes that depend on the data, between operators and at an output."""
    return model_of(
        """(float[4,3] x, bool[4] keep) => (float[rows,3] kept, float total, int64[2,count] at) {
            a = Relu(x)
            some = Compress<axis = 0>(a, keep)
            kept = Neg(some)
            at = NonZero(a)
            total = ReduceSum<keepdims = 0>(kept)
        }"""
    )


def large_weight() -> onnx.ModelProto:
    """A weight of 4 KiB that two operators share."""
    return model_of(
        """(float[2,32] x) => (float[2,32] y) {
            a = MatMul(x, table)
            b = Relu(x)
            c = MatMul(b, table)
            y = Add(a, c)
        }""",
        table=weight(32, 32),
    )


def split() -> onnx.ModelProto:
    """Operators with several outputs, one of which nobody reads."""
    return model_of(
        """(float[2,6] x) => (float[2,2] y, int64[2,1] best) {
            first, unread, last = Split<axis = 1>(x)
            values, best = TopK(first, one)
            y = Add(last, values)
        }""",
        one=np.array([1], np.int64),
    )


def read_output() -> onnx.ModelProto:
    """Outputs that operators of the model read too."""
    return model_of(
        """(float[3] x) => (float[3] a, float[3] b, float[3] c) {
            a = Relu(x)
            b = Add(a, x)
            d = Neg(b)
            c = Add(a, d)
        }"""
    )


def optional_input() -> onnx.ModelProto:
    """An optional input left empty in the middle."""
    return model_of(
        """(float[3] x) => (float[3] y) {
            a = Neg(x)
            b = Clip(a, "", high)
            y = Add(a, b)
        }""",
        high=np.array(0.5, np.float32),
    )


def views() -> onnx.ModelProto:
    """Reshapes of all kinds of tensors, some read beside what they view."""
    return model_of(
        """(float[2,6] x) => (float[12] flat, float[3,4] sum, float[1,2,6] lifted) {
            a = Relu(x)
            wide = Reshape(a, to_wide)
            tall = Reshape(wide, to_tall)
            flat = Reshape(a, to_flat)
            b = Exp(tall)
            c = Neg(tall)
            sum = Add(b, c)
            d = Mul(x, a)
            lifted = Unsqueeze(d, axes)
        }""",
        to_wide=np.array([4, 3], np.int64),
        to_tall=np.array([3, 4], np.int64),
        to_flat=np.array([12], np.int64),
        axes=np.array([0], np.int64),
    )


MODELS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    builder.__name__: builder
    for builder in (
        chain, diamond, fork_join, two_towers, branch, loop, sequence, data_dependent,
        large_weight, split, read_output, optional_input, views,
    )
}  # fmt: skip


@st.composite
def random_models(draw: DrawFn, max_nodes: int = 8) -> onnx.ModelProto:
    """Elementwise operators over tensors of one shape; some outputs are read inside too."""
    tensors, lines = ["x0", "x1"], []
    for number in range(draw(st.integers(1, max_nodes))):
        kind, arity = draw(st.sampled_from([("Neg", 1), ("Relu", 1), ("Add", 2), ("Max", 2)]))
        reads = [draw(st.sampled_from(tensors)) for _ in range(arity)]
        lines.append(f"t{number} = {kind}({', '.join(reads)})")
        tensors.append(f"t{number}")
    outputs = draw(st.lists(st.sampled_from(tensors[2:]), min_size=1, max_size=3, unique=True))
    results = ", ".join(f"float[2,3] {name}" for name in outputs)
    return model_of(f"(float[2,3] x0, float[2,3] x1) => ({results}) {{ {' '.join(lines)} }}")


def tensor_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    """The type of every tensor of a model of `model_of`; sequences have none."""
    graph = model.graph
    types = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            dims = value.type.tensor_type.shape.dim
            static = value.type.tensor_type.HasField("shape") and all(
                dim.HasField("dim_value") for dim in dims
            )
            shape = tuple(dim.dim_value for dim in dims) if static else None
            types[value.name] = TensorType(value.type.tensor_type.elem_type, shape)
    return types


def host_reasons(model: onnx.ModelProto) -> dict[str, str]:
    """Why nodes can't be captured: control flow, sequences and shapes not known."""
    types = tensor_types(model)
    weights = {initializer.name for initializer in model.graph.initializer}
    reasons = {}
    for node in model.graph.node:
        names = {name for name in (*node.input, *node.output) if name} - weights
        if node.op_type in ("If", "Loop"):
            reasons[node.name] = f"{node.op_type} decides at run time"
        elif not all(name in types and types[name].is_static for name in names):
            reasons[node.name] = "a tensor without a static type"
    return reasons


def annotation_of(
    model: onnx.ModelProto,
    streams: Sequence[int] = (1, 2, 3),
    *,
    device: Device = CPU,
    device_count: int = 1,
    order: Sequence[int] | None = None,
) -> Annotation:
    """An annotation that gives streams, and devices, to the nodes in turn.

    Args:
        model: A model of `model_of`.
        streams: Given out in launch order, again from the start when used up.
        device: Where they run, the first of `device_count`.
        device_count: How many devices share them.
        order: Indices of the nodes in launch order; as in the model if None.
    """
    nodes = model.graph.node
    launched = [nodes[i].name for i in (range(len(nodes)) if order is None else order)]
    return Annotation(
        placements={
            name: Placement(
                replace(device, index=device.index + position % device_count),
                streams[position % len(streams)],
            )
            for position, name in enumerate(launched)
        },
        tensors=tensor_types(model),
        host_reasons=host_reasons(model),
        details={"policy": "by hand"},
    )


def annotated(
    model: onnx.ModelProto,
    streams: Sequence[int] = (1, 2, 3),
    *,
    device: Device = CPU,
    device_count: int = 1,
    order: Sequence[int] | None = None,
) -> onnx.ModelProto:
    """The same model, annotated as `annotation_of` says, in place."""
    made = annotation_of(model, streams, device=device, device_count=device_count, order=order)
    write_annotation(model, made)
    return model


def feeds_for(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """A random value for every input; integers are 0 or 1."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        drawn = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(2, size=shape)
        feeds[value.name] = np.asarray(drawn, dtype)
    return feeds


def plain_session(model: onnx.ModelProto) -> Any:
    """ONNX Runtime alone, on the CPU."""
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    """What plain ONNX Runtime computes."""
    return list(plain_session(model).run(None, dict(feeds)))


def assert_same(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    """Check outputs, sequences among them, up to how sums are grouped."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, list):
            assert_same(one, other)
        else:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
