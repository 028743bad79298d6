"""The zoo rebuilt in torch computes what plain ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from onnxsched.inputs import random_inputs
from onnxsched.shapes import tensor_types
from onnxsched_runtime.errors import ModelError
from sample_models import MODELS, build
from support.optimizing import assert_close, parsed
from tools.torch_peer import TorchModel, torch_model

SMALL = {
    "googlenet": {"image": 64},
    "inception_v3": {"image": 107},
    "squeezenet": {"image": 50},
    "nasnet_large": {"image": 35},
    "nasnet_mobile": {"image": 35},
    "randwire": {"image": 33},
    "bert": {"sequence": 9},
    "t5_encoder": {"sequence": 7},
    "t5_decoder": {"sequence": 7},
    "deepfm": {},
}


def assert_same_as_ort(model: onnx.ModelProto) -> TorchModel:
    """Run both on two sets of inputs and compare every output."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    peer = torch_model(model)
    assert peer.outputs == tuple(value.name for value in model.graph.output)
    for seed in range(2):
        feeds = random_inputs(model, tensor_types(model), seed)
        with torch.inference_mode():
            found = peer.module(*(torch.from_numpy(feeds[name]) for name in peer.inputs))
        assert_close([tensor.numpy() for tensor in found], session.run(None, feeds))
    return peer


@pytest.mark.usefixtures("shallow_transformers")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_computes_what_ort_does(name: str) -> None:
    peer = assert_same_as_ort(build(name, batch=2, **SMALL[name]))
    assert not any(p.requires_grad for p in peer.module.parameters())


def weight(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


W = weight(3, 2, 3, 3)
OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv_same_upper": (
        '(float[1,2,7,6] x) { y = Conv<auto_pad = "SAME_UPPER", strides = [2,2]>(x, w) }',
        {"w": W},
    ),
    "conv_same_lower": (
        '(float[1,2,7,6] x) { y = Conv<auto_pad = "SAME_LOWER", strides = [2,3]>(x, w) }',
        {"w": W},
    ),
    "conv_valid": ('(float[1,2,7,6] x) { y = Conv<auto_pad = "VALID">(x, w) }', {"w": W}),
    "conv_dilated": (
        "(float[1,2,9,8] x) { y = Conv<dilations = [2,3], pads = [1,0,2,3]>(x, w) }",
        {"w": W},
    ),
    "max_pool_round_up": (
        """(float[1,2,8,8] x) {
            y = MaxPool<kernel_shape = [3,3], strides = [2,2], ceil_mode = 1>(x) }""",
        {},
    ),
    "max_pool_unequal": (
        """(float[1,2,8,8] x) {
            y = MaxPool<kernel_shape = [3,3], pads = [0,1,2,1], strides = [2,2]>(x) }""",
        {},
    ),
    "max_pool_same": (
        '(float[1,2,7,8] x) { y = MaxPool<kernel_shape = [2,3], auto_pad = "SAME_UPPER">(x) }',
        {},
    ),
    "max_pool_line": (
        "(float[1,2,9] x) { y = MaxPool<kernel_shape = [3], dilations = [2]>(x) }",
        {},
    ),
    "average_pool_counting": (
        """(float[1,2,7,7] x) {
            y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1>(x) }""",
        {},
    ),
    "average_pool_not_counting": (
        """(float[1,2,7,7] x) {
            y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1], strides = [2,2]>(x) }""",
        {},
    ),
    "average_pool_unequal": (
        """(float[1,2,7,7] x) {
            y = AveragePool<kernel_shape = [3,3], pads = [0,1,2,1], count_include_pad = 1>(x) }""",
        {},
    ),
    "pad": ("(float[2,3,4] x) { y = Pad(x, p, c) }", {"p": [0, 1, 0, 2, 0, -1], "c": 1.5}),
    "gather_negative": ("(float[3,4] x) { y = Gather<axis = 1>(x, i) }", {"i": [-1, 1, -3]}),
    "gather_range": ("(float[3,4] x) { y = Gather<axis = 1>(x, i) }", {"i": [-3, -2]}),
    "gather_one": ("(float[3,4] x) { y = Gather<axis = 1>(x, i) }", {"i": -2}),
    "gather_computed_negative": (
        "(int64[2,3] x) { i = Sub(x, two) y = Gather(v, i) }",
        {"two": 2, "v": weight(4, 5)},
    ),
    "gemm": (
        "(float[4,3] x) { y = Gemm<alpha = 0.5, beta = 2.0, transA = 1>(x, v, c) }",
        {"v": weight(4, 5), "c": weight(3, 1)},
    ),
    "gemm_without_bias": ("(float[3,5] x) { y = Gemm<transB = 1>(x, v) }", {"v": weight(4, 5)}),
    "softmax": ("(float[2,3,4] x) { y = Softmax<axis = 1>(x) }", {}),
    "where": (
        "(float[2,3] x) { b = Cast<to = 9>(m) y = Where(b, x, z) }",
        {"m": [1, 0, 1], "z": 0.5},
    ),
    "pow": ("(float[2,3] x) { y = Pow(x, e) }", {"e": 3.0}),
    "pow_base": ("(float[2,3] x) { y = Pow(e, x) }", {"e": 3.0}),
    "div_integers": (
        "(int64[2,3] x) { n = Sub(x, m) z = Div(n, t) y = Cast<to = 1>(z) }",
        {"m": [-7, 5, 9], "t": 2},
    ),
    "reduce_all": ("(float[2,3,4] x) { y = ReduceMean<keepdims = 0>(x) }", {}),
    "reduce_axes": ("(float[2,3,4] x) { y = ReduceMean<axes = [-1,0]>(x) }", {}),
    "reduce_input": ("(float[2,3,4] x) { y = ReduceSum<keepdims = 0>(x, a) }", {"a": [1]}),
    "reduce_nothing": ("(float[2,3] x) { y = ReduceSum<noop_with_empty_axes = 1>(x) }", {}),
    "split_even": ("(float[2,6] x) { a, b = Split<axis = 1>(x) y = Sub(a, b) }", {}),
    "split_sizes": (
        "(float[2,5] x) { a, b = Split<axis = -1>(x, s) y = Concat<axis = 1>(b, a) }",
        {"s": [2, 3]},
    ),
    "slice": (
        "(float[4,9] x) { y = Slice(x, b, e, a, s) }",
        {"b": [-100, 1], "e": [3, 1000], "a": [0, -1], "s": [1, 3]},
    ),
    "slice_without_axes": (
        "(float[4,9] x) { y = Slice(x, b, e, , s) }",
        {"b": [1, -4], "e": [-1, 9], "s": [2, 1]},
    ),
    "reshape": ("(float[2,3,4] x) { y = Reshape(x, s) }", {"s": [0, -1, 2]}),
    "expand": ("(float[2,1] x) { y = Expand(x, s) }", {"s": [3, 1, 4]}),
    "squeeze": ("(float[1,2,1] x) { y = Squeeze(x) }", {}),
    "squeeze_one": ("(float[1,2,1] x) { y = Squeeze(x, a) }", {"a": [-1]}),
    "unsqueeze": ("(float[2,3] x) { y = Unsqueeze(x, a) }", {"a": [-1, 0]}),
    "transpose": ("(float[2,3,4] x) { y = Transpose(x) }", {}),
    "flatten": ("(float[2,3,4] x) { y = Flatten<axis = -1>(x) }", {}),
    "layer_norm": (
        "(float[2,3,4] x) { y = LayerNormalization<axis = 1>(x, s, b) }",
        {"s": weight(3, 4), "b": weight(3, 4)},
    ),
}


def small(text: str, weights: dict[str, Any], opset: int = 17) -> onnx.ModelProto:
    """A model to `y` with its types inferred; numbers become int64 or float32."""
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in weights.items()}
    arrays = {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in arrays.items()}
    model = parsed(text.replace(" {", " => (float[] y) {", 1), opset=opset, **arrays)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_computes_what_ort_does(name: str) -> None:
    assert_same_as_ort(small(*OPERATORS[name]))


def test_softmax_flattens_in_old_opsets() -> None:
    assert_same_as_ort(small("(float[2,3,4] x) { y = Softmax(x) }", {}, opset=11))


def test_what_depends_on_constants_only_is_folded() -> None:
    text = "(float[3,1] x) { d = Add(c, c) e = Sqrt(d) f = Relu(d) y = Add(x, f) }"
    peer = assert_same_as_ort(small(text, {"c": np.ones((3, 1))}))
    calls = [node for node in peer.module.graph.nodes if node.op == "call_function"]
    assert len(calls) == 1
    assert len(list(peer.module.parameters())) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{ y = Cos(x) }", "is a Cos, which the torch peer does not support"),
        ("{ s = Cast<to = 7>(x) y = Reshape(x, s) }", "with input 1 known only in a run"),
        ('{ y = Pad<mode = "reflect">(x, p) }', "with mode reflect"),
    ],
)
def test_what_is_not_supported_is_named_in_one_sentence(text: str, complaint: str) -> None:
    model = parsed(f"(float[2] x) => (float[] y) {text}", p=np.array([1, 1]))
    with pytest.raises(ModelError, match=complaint) as caught:
        torch_model(model)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
