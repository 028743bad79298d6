"""What is loaded computes the same with fewer operators, for the models of the zoo."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxsched.loading import load_model
from onnxsched.shapes import tensor_types
from sample_models import build
from support.models import CPU, feeds_for, reference
from support.optimizing import assert_close, loaded, parsed, plain_outputs, saved
from support.simplifying import op_counts, simplified

TRANSFORMERS = {
    ("t5_decoder", 1): {
        "Transpose": 0, "Pow": 0, "Sqrt": 0, "ReduceMean": 0, "Mul": 0, "Add": 2,
        "SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 6,
    },
    ("t5_encoder", 1): {
        "Transpose": 0, "Pow": 0, "Sqrt": 0, "ReduceMean": 0, "Add": 3, "FusedMatMul": 6,
        "SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 4,
    },
    ("t5_encoder", 2): {"Transpose": 8, "SkipSimplifiedLayerNormalization": 4},
    ("bert", 1): {
        "Transpose": 0, "Gelu": 0, "BiasGelu": 2, "Gemm": 0, "FusedMatMul": 6, "Add": 5,
        "SkipLayerNormalization": 5,
    },
}  # fmt: skip
"""For a model of two layers and a batch, how many operators of a type are left."""


@pytest.mark.usefixtures("shallow_transformers")
@pytest.mark.parametrize(("name", "batch"), TRANSFORMERS)
def test_transformers_compute_the_same_with_fewer_operators(
    name: str, batch: int, tmp_path: Path
) -> None:
    path = saved(build(name, sequence=4, batch=batch), tmp_path)
    model = load_model(path, CPU)
    feeds = feeds_for(model.baseline)
    assert_close(reference(model.proto, feeds), plain_outputs(path, feeds))
    counts = op_counts(model.proto)
    expected = TRANSFORMERS[name, batch]
    assert {kind: counts[kind] for kind in expected} == expected
    flowing = {tensor for node in model.proto.graph.node for tensor in node.output if tensor}
    assert all(model.tensors[tensor].is_static for tensor in flowing)
    assert tensor_types(simplified(model.proto)) == model.tensors


@pytest.mark.parametrize("name", ["tiny", "squeezenet", "googlenet", "deepfm"])
def test_models_without_attention_are_left_alone_but_for_relus(name: str, tmp_path: Path) -> None:
    model = build(name) if name in ("tiny", "deepfm") else build(name, image=64)
    path = saved(model, tmp_path)
    proto = load_model(path, CPU).proto
    feeds = feeds_for(model)
    assert_close(reference(proto, feeds), plain_outputs(path, feeds))
    again = simplified(proto)
    assert [node.name for node in again.graph.node] == [node.name for node in proto.graph.node]


def test_a_norm_of_onnx_runtimes_own_is_valid(tmp_path: Path) -> None:
    model = parsed(
        """(float[2,3] x, float[3] w) => (float[2,3] y) {
            y = SimplifiedLayerNormalization<axis = -1, epsilon = 1e-6>(x, w)
        }"""
    )
    assert op_counts(loaded(model, tmp_path).proto) == {"SimplifiedLayerNormalization": 1}
    assert not onnx.defs.has("SimplifiedLayerNormalization")
