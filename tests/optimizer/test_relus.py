"""One Relu after a Concat or a pool computes what those before it do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsched.simplification.relus import rectify_after_concat
from onnxsched_runtime.model import name_nodes
from sample_models import build
from support.simplifying import assert_equivalent, simplified, written

SHAPE = (1, 2, 4, 4)


def model_of(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("a", "b")],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "c", "h", "w"])
            for name in outputs
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    name_nodes(model)
    onnx.checker.check_model(model)
    return model


def relu(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [target])


def concat(*sources: str, target: str = "y") -> onnx.NodeProto:
    return helper.make_node("Concat", list(sources), [target], axis=1)


def pool(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("MaxPool", [source], [target], kernel_shape=[1, 1])


def results(model: onnx.ModelProto) -> list[np.ndarray]:
    import onnx.reference

    generator = np.random.default_rng(0)
    feeds = {n: generator.standard_normal(SHAPE).astype(np.float32) for n in ("a", "b")}
    return list(onnx.reference.ReferenceEvaluator(model).run(None, feeds))


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([relu("a", "p"), relu("b", "q"), concat("p", "q")], ["Concat", "Relu"]),
        (
            [relu("a", "p"), relu("b", "q"), relu("a", "r"), pool("r", "s"),
             concat("p", "q", "s")],
            ["Relu", "MaxPool", "Concat", "Relu"],
        ),
        (
            [relu("a", "p"), relu("b", "q"), concat("p", "q", target="c"), relu("a", "r"),
             concat("c", "r")],
            ["Concat", "Concat", "Relu"],
        ),
    ],
    ids=["all", "one that is positive", "twice"],
)  # fmt: skip
def test_relus_before_a_concat_become_one_after_it(
    nodes: list[onnx.NodeProto], expected: list[str]
) -> None:
    model = model_of(*nodes)
    before = results(model)
    assert rectify_after_concat(model) == len(nodes) - len(expected)
    assert op_types(model) == expected
    name_nodes(model)
    onnx.checker.check_model(model)
    for one, other in zip(before, results(model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "model",
    [
        model_of(relu("a", "p"), concat("p", "b")),
        model_of(relu("a", "p"), relu("b", "q"), pool("a", "r"), concat("p", "q", "r")),
        model_of(relu("a", "p"), relu("b", "q"), concat("p", "q"), outputs=("y", "p", "q")),
        model_of(relu("a", "p"), relu("b", "q"), concat("p", "q"), pool("p", "z"), pool("q", "w"),
                 outputs=("y", "z", "w")),
        model_of(relu("a", "p"), concat("p", "p")),
    ],
    ids=["one has none", "one may be negative", "outputs", "other readers", "read twice"],
)  # fmt: skip
def test_what_would_compute_something_else_stays(model: onnx.ModelProto) -> None:
    before = op_types(model)
    assert rectify_after_concat(model) == 0
    assert op_types(model) == before


def test_inception_modules_lose_three_relus_each() -> None:
    model = build("googlenet", image=64)
    assert rectify_after_concat(model) == 9 * 3
    assert op_types(model).count("Relu") == 57 - 9 * 3


def halves(source: str, target: str, **attributes: Any) -> onnx.NodeProto:
    given = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, **attributes}
    return helper.make_node("MaxPool", [source], target.split(), **given)


def loaded_types(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Types of operators before and after a model is simplified, which changes no result."""
    before, types = results(model), op_types(model)
    simple = simplified(model)
    for one, other in zip(before, results(simple), strict=True):
        np.testing.assert_array_equal(one, other)
    return types, op_types(simple)


@pytest.mark.parametrize(
    "nodes",
    [
        [relu("a", "p"), halves("p", "y")],
        [relu("a", "p"), relu("b", "q"), concat("p", "q", target="c"), halves("c", "y")],
    ],
    ids=["one", "after a concat"],
)
def test_a_pool_that_makes_an_image_smaller_comes_before_the_relu(
    nodes: list[onnx.NodeProto],
) -> None:
    _, after = loaded_types(model_of(*nodes))
    assert after[-2:] == ["MaxPool", "Relu"]
    assert after.count("Relu") == 1


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([relu("a", "p"), halves("p", "y", strides=[1, 1])], ("y",)),
        ([relu("a", "p"), halves("p", "y"), halves("p", "z", pads=[0] * 4)], ("y", "z")),
        ([relu("a", "p"), halves("p", "y")], ("y", "p")),
        ([helper.make_node("Tanh", ["a"], ["p"]), halves("p", "y")], ("y",)),
        ([relu("a", "p"), halves("p", "y", kernel_shape=[2, 2], dilations=[2, 2])], ("y",)),
    ],
    ids=["as large", "other readers", "an output", "no Relu", "windows with gaps"],
)
def test_other_relus_stay_before_a_pool(
    nodes: list[onnx.NodeProto], outputs: tuple[str, ...]
) -> None:
    before, after = loaded_types(model_of(*nodes, outputs=outputs))
    assert after == before


@pytest.mark.parametrize("width", [1, 2])
def test_a_relu_keeps_onnx_runtime_from_taking_a_pad_into_a_pool(width: int) -> None:
    model = written(
        """(float[1,2,9,9] x) => (float[1,2,h,w] y) {
            padded = Pad(x, pads)
            rectified = Relu(padded)
            y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(rectified)
        }""",
        pads=np.array([0, 0, width, width, 0, 0, width, width]),
    )
    changed = simplified(model)
    assert op_types(changed) == ["Pad", "Relu", "MaxPool"]
    assert_equivalent(changed, model)


def test_a_pool_that_sees_padding_alone_may_be_negative() -> None:
    model = written(
        """(float[1,2,2,2] x, float[1,2,1,1] z) => (float[1,6,1,1] y) {
            a = Relu(x)
            p = MaxPool<kernel_shape = [2,2], dilations = [3,3], pads = [1,1,1,1]>(a)
            b = Relu(z)
            n = Neg(z)
            c = Relu(n)
            y = Concat<axis = 1>(p, b, c)
        }"""
    )
    assert_equivalent(simplified(model), model)


def test_names_that_are_taken_are_left_to_their_owners() -> None:
    model = written(
        """(float[1,2] x, float[1,2] z) => (float[1,4] y, float[1,2] w) {
            a = Relu(x)
            b = Relu(z)
            q = Neg(x)
            y = Concat<axis = 1>(a, b)
            w = Exp(q)
        }"""
    )
    taken = "y/joined"
    for node in model.graph.node:
        node.input[:] = [taken if name == "q" else name for name in node.input]
        node.output[:] = [taken if name == "q" else name for name in node.output]
    changed = simplified(model)
    assert op_types(changed).count("Relu") == 1
    assert_equivalent(changed, model)
