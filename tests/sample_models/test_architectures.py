"""Each model of its default size against what is published about it."""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Arrays = dict[str, npt.NDArray[Any]]

_T5_SMALL = 60_506_624
_T5_ENCODER_BLOCK = 4 * 512 * 512 + 512 + 2 * 512 * 2048 + 512
_T5_ENCODER_ONLY = 6 * _T5_ENCODER_BLOCK + 32 * 8 + 512
# The decoder step leaves out the encoder; the projections that give the keys and values of
# the cross-attention, which arrive as inputs; and the table of relative positions, which is
# folded. The embedding is in it: the head shares it.
_T5_STEP = _T5_SMALL - _T5_ENCODER_ONLY - 6 * 2 * 512 * 512 - 32 * 8

PARAMETERS = {
    "googlenet": 6_624_904,
    "inception_v3": 23_834_568,
    "squeezenet": 1_235_496,
    "nasnet_large": 88_753_150,
    "nasnet_mobile": 5_289_978,
    "bert": 109_482_240,
    "t5_encoder": 32_128 * 512 + _T5_ENCODER_ONLY,
    "t5_decoder": _T5_STEP,
    # 32 tables of 1000 and 16 numeric features, of 8 numbers each and of one number each,
    # a bias, and a perceptron of 384-256-128-1.
    "deepfm": (32 * 1000 + 16) * 9 + 1 + 385 * 256 + 257 * 128 + 129,
}

# A normal and a reduction cell of NASNet-A have 5 separable convolutions, each applied twice
# as a depthwise and a pointwise one, and one squeezing the cell before. The cell before that is
# adjusted by one convolution, or two where the image halves, except for the first cell.
_LARGE_CELLS = 4 + 3 * 6
_MOBILE_CELLS = 4 + 3 * 4


def _nasnet_convs(cells: int) -> int:
    stem, halvings = 1, 4
    return stem + cells * (5 * 2 * 2 + 1) + (cells - 1) + halvings


OPERATORS = {
    "tiny": {"Conv": 7, "BatchNormalization": 7, "Concat": 1},
    "googlenet": {"Conv": 57, "BatchNormalization": 57, "MaxPool": 13, "Concat": 9, "Gemm": 1},
    "inception_v3": {"Conv": 94, "Relu": 94, "AveragePool": 9, "MaxPool": 4, "Concat": 15},
    "squeezenet": {"Conv": 26, "Relu": 26, "MaxPool": 3, "Concat": 8, "BatchNormalization": 0},
    "nasnet_large": {
        "Conv": _nasnet_convs(_LARGE_CELLS),
        "Add": 5 * _LARGE_CELLS,
        "Concat": _LARGE_CELLS + 4,
        "AveragePool": 3 * 18 + 2 * 4 + 2 * 4,
        "MaxPool": 2 * 4,
    },
    "nasnet_mobile": {
        "Conv": _nasnet_convs(_MOBILE_CELLS),
        "Add": 5 * _MOBILE_CELLS,
        "Concat": _MOBILE_CELLS + 4,
        "AveragePool": 3 * 12 + 2 * 4 + 2 * 4,
        "MaxPool": 2 * 4,
    },
    # 64 edges a stage, each with a weight, and the mean of its ends.
    "randwire": {"Conv": 2 + 3 * 32 * 2 + 1, "Mul": 3 * (64 + 1), "Relu": 1 + 3 * 32 + 2},
    # Projections of queries, keys, values and output, two products, and two layers forward.
    "bert": {
        "MatMul": 12 * (4 + 2 + 2),
        "Softmax": 12,
        "Erf": 12,
        "LayerNormalization": 1 + 12 * 2,
        "Gather": 3 + 1,
        "Gemm": 1,
    },
    "t5_encoder": {"MatMul": 6 * (4 + 2 + 2), "Softmax": 6, "ReduceMean": 6 * 2 + 1, "Relu": 6},
    "t5_decoder": {
        "MatMul": 6 * ((4 + 2) + (2 + 2) + 2),
        "Softmax": 6 * 2,
        "ReduceMean": 6 * 3 + 1,
        "Concat": 6 * 2,
        "Gemm": 1,
    },
    "deepfm": {"Gather": 32 * 3, "Gemm": 4, "Relu": 2, "Concat": 2, "Sigmoid": 1},
}


def _parameters(model: onnx.ModelProto) -> int:
    """Counts the trainable parameters, which the statistics of BatchNormalization are not."""
    return sum(
        prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.name.rsplit("/", 1)[-1] in ("weight", "bias")
    )


def test_parameters_are_the_published_ones(built: onnx.ModelProto) -> None:
    if built.graph.name == "randwire":
        assert abs(_parameters(built) - 5.6e6) <= 0.1e6
    elif built.graph.name in PARAMETERS:
        assert _parameters(built) == PARAMETERS[built.graph.name]
    else:
        assert built.ByteSize() < 16_384


def test_t5_parts_add_up_to_what_is_published() -> None:
    decoder = 6 * (2 * (4 * 512 * 512 + 512) + 2 * 512 * 2048 + 512) + 32 * 8 + 512
    assert 32_128 * 512 + _T5_ENCODER_ONLY + decoder == _T5_SMALL


def test_operators_are_those_of_the_architecture(built: onnx.ModelProto) -> None:
    counts = Counter(node.op_type for node in built.graph.node)
    expected = OPERATORS[built.graph.name]
    assert {kind: counts[kind] for kind in expected} == expected


def test_the_checker_accepts_it(built: onnx.ModelProto) -> None:
    onnx.checker.check_model(built, full_check=True)
    assert built.ir_version == 8
    assert [(entry.domain, entry.version) for entry in built.opset_import] == [("", 17)]


def test_names_are_unique_and_tell_where_they_belong(built: onnx.ModelProto) -> None:
    graph = built.graph
    nodes = [node.name for node in graph.node]
    tensors = [output for node in graph.node for output in node.output]
    weights = [tensor.name for tensor in graph.initializer]
    values = [*tensors, *weights, *(value.name for value in graph.input)]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        assert set(node.output) <= {f"{node.name}:0", *outputs}
    assert all("/" in weight for weight in weights)


def test_shapes_are_static_and_known(built: onnx.ModelProto) -> None:
    graph = built.graph
    known = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    assert all(min(shape) > 0 for shape in known.values())
    assert {output for node in graph.node for output in node.output} <= known.keys()


def test_outputs_are_finite_varied_and_depend_on_the_inputs(
    built: onnx.ModelProto,
    load: Callable[[onnx.ModelProto], Callable[[Arrays], Arrays]],
    draw: Callable[[onnx.ModelProto, int], Arrays],
) -> None:
    run = load(built)
    results = [run(draw(built, seed)) for seed in (1, 2)]
    for name, value in results[0].items():
        spread = float(value.std()) if value.size > 1 else 1.0
        assert np.isfinite(value).all()
        assert 0.1 < spread < 100
        assert np.abs(value - results[1][name]).max() > 0.02 * spread
