"""Pools have the shapes that ONNX Runtime gives them, and compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

import onnxsched
from onnxsched.pool_padding import agree_on_pool, has_doubtful_pool
from onnxsched.shapes import tensor_types
from onnxsched_runtime.errors import ModelError
from support.models import assert_same, feeds_for, reference
from support.optimizing import assert_close, loaded, plain_outputs, saved
from support.simplifying import image_model


@st.composite
def windows(draw: DrawFn) -> tuple[str, dict[str, Any], list[int], int]:
    """A kind of pool, its attributes, the size of its image, and an opset."""
    kind = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    opset = draw(st.sampled_from([17, 22]))
    kernel = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2))
    strides = st.lists(st.integers(1, 3), min_size=2, max_size=2)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": draw(strides)}
    if kind == "MaxPool" or opset == 22:
        attributes["dilations"] = draw(strides)
    attributes["ceil_mode"] = draw(st.sampled_from([0, 1, 1]))
    auto_pad = draw(st.sampled_from(["", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad:
        attributes["auto_pad"] = auto_pad
    else:
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in [*kernel, *kernel]]
    if kind == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    spans = [
        (k - 1) * d + 1 for k, d in zip(kernel, attributes.get("dilations", (1, 1)), strict=True)
    ]
    least = draw(st.sampled_from([0, 0, 2]))  # an image may be smaller than a window
    sizes = [draw(st.integers(max(1, span - least), span + 6)) for span in spans]
    return kind, attributes, sizes, opset


def pooled(kind: str, attributes: dict[str, Any], sizes: list[int], opset: int) -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("Neg", ["x"], ["a"]),
        onnx.helper.make_node(kind, ["a"], ["b"], **attributes),
        onnx.helper.make_node("Exp", ["b"], ["y"]),
    ]
    return image_model(nodes, (1, 2, *sizes), [], ["y"], opset)


@settings(deadline=None, max_examples=300)
@given(windows())
def test_onnx_and_ort_agree_after(drawn: tuple[str, dict[str, Any], list[int], int]) -> None:
    model = pooled(*drawn)
    feeds = feeds_for(model, seed=0)
    try:
        expected = reference(model, feeds)
    except Exception:  # what ORT refuses needs no agreement
        return
    if 0 in expected[0].shape:
        return
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if not agree_on_pool(changed, tensor_types(changed)):
        assert changed == model
    assert_close(reference(changed, feeds), expected, 1e-5)
    if has_doubtful_pool(model):  # of others onnx is left to know better: their image is empty
        assert tensor_types(changed)["y"].shape == expected[0].shape
    assert not agree_on_pool(changed, tensor_types(changed))


@pytest.mark.parametrize(
    ("kind", "attributes", "size", "expected"),
    [
        ("MaxPool", {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1}, 8, 4),
        ("AveragePool", {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1}, 8, 4),
        (
            "MaxPool",
            {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1},
            9,
            5,
        ),
        ("MaxPool", {"kernel_shape": [3, 3], "dilations": [2, 2], "auto_pad": "SAME_UPPER"}, 8, 6),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 8, 4),
    ],
)
def test_pools_are_loaded_with_the_shape_that_they_make(
    kind: str, attributes: dict[str, Any], size: int, expected: int, tmp_path: Path
) -> None:
    model = pooled(kind, attributes, [size, size], 17)
    found = loaded(model, tmp_path)
    assert found.tensors["y"].shape == (1, 2, expected, expected)
    feeds = feeds_for(model, seed=0)
    for proto in (found.proto, found.baseline):
        assert_close(reference(proto, feeds), reference(model, feeds), 1e-5)


@pytest.mark.parametrize(
    ("kind", "attributes", "sizes"),
    [
        (
            "MaxPool",
            {"kernel_shape": [1, 2], "strides": [3, 3], "dilations": [2, 2], "ceil_mode": 1,
             "pads": [0, 0, 0, 1]},
            [9, 13],
        ),
        (
            "MaxPool",
            {"kernel_shape": [2, 2], "strides": [1, 3], "dilations": [2, 2],
             "auto_pad": "SAME_UPPER"},
            [4, 3],
        ),
        (
            "AveragePool",
            {"kernel_shape": [3, 1], "strides": [2, 3], "count_include_pad": 1, "ceil_mode": 1},
            [16, 8],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_last", [False, True])
def test_shapes_that_onnx_gets_wrong_are_those_that_ort_makes(
    kind: str, attributes: dict[str, Any], sizes: list[int], is_last: bool, tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node(kind, ["x"], ["a"], **attributes),
        onnx.helper.make_node("Conv", ["a", "w"], ["b"]),
        onnx.helper.make_node("Relu", ["b"], ["c"]),  # fused: onnx infers nothing behind it
        onnx.helper.make_node(kind, ["c"], ["d"], kernel_shape=[1, 1], ceil_mode=1),
        onnx.helper.make_node("Exp", ["d"], ["e"]),
    ]
    ends = ["a"] if is_last else ["a", "c", "e"]
    weight = onnx.numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    model = image_model(nodes[: 1 if is_last else 5], (1, 2, *sizes), [weight], ends)
    feeds = feeds_for(model, seed=0)
    expected = dict(zip(ends, plain_outputs(saved(model, tmp_path), feeds), strict=True))
    found = loaded(model, tmp_path)
    assert {end: found.tensors[end].shape for end in ends} == {
        end: array.shape for end, array in expected.items()
    }
    assert all(kind.is_static for kind in found.tensors.values())
    onnxsched.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", device="cpu", cache_dir=None, budget_s=0
    )
    assert_close(plain_outputs(tmp_path / "out.onnx", feeds), list(expected.values()))


PADDED_POOLS: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_shape": [3, 2], "strides": [2, 3], "auto_pad": "VALID", "ceil_mode": 1}),
    (2, {"kernel_shape": [2, 2], "strides": [2, 3], "auto_pad": "VALID", "ceil_mode": 1}),
    (1, {"kernel_shape": [2, 2], "dilations": [2, 2], "auto_pad": "SAME_UPPER"}),
    (1, {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1}),
    (1, {"kernel_shape": [3, 2], "strides": [2, 3]}),
]


@pytest.mark.parametrize(("more", "attributes"), PADDED_POOLS)
def test_zeros_around_an_image_count_where_they_do_in_plain_ort(
    more: int, attributes: dict[str, Any], tmp_path: Path
) -> None:
    nodes = [
        onnx.helper.make_node("Pad", ["x", "sides"], ["a"]),
        onnx.helper.make_node("MaxPool", ["a"], ["y"], **attributes),
    ]
    sides = onnx.numpy_helper.from_array(np.array([0] * 6 + [more, 0]), "sides")
    model = image_model(nodes, (1, 2, 17 - more, 9), [sides], ["y"])
    feeds = {"x": -1 - feeds_for(model, seed=0)["x"] ** 2}
    expected = plain_outputs(saved(model, tmp_path), feeds)
    found = loaded(model, tmp_path)
    assert [n.op_type for n in found.baseline.graph.node] == ["Pad", "MaxPool"]
    assert list(found.baseline.graph.node[1].attribute) == list(nodes[1].attribute)
    assert_same(plain_outputs(saved(found.proto, tmp_path, "out.onnx"), feeds), expected)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2]},
        {"kernel_shape": [0, 2]},
        {"strides": [2]},
        {"strides": [0, 0]},
        {"strides": [2, -1]},
        {"pads": [1, 1]},
        {"pads": [1, 1, 1]},
        {"dilations": [1]},
        {"auto_pad": "SAME_UPPER", "dilations": [2, 2], "strides": [0, 1]},
        {"auto_pad": "SAME_LOWER", "dilations": [2, 2], "kernel_shape": [2, 2, 2]},
    ],
    ids=str,
)
def test_pools_that_make_no_sense_are_left_to_ort(
    attributes: dict[str, Any], tmp_path: Path
) -> None:
    given = {"kernel_shape": [2, 2], "ceil_mode": 1, **attributes}
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        loaded(pooled("MaxPool", given, [8, 8], 17), tmp_path)


def test_every_pool_of_several_is_seen(tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1}
    nodes = [
        onnx.helper.make_node("MaxPool", ["x"], ["a"], **attributes),
        onnx.helper.make_node("Neg", ["a"], ["b"]),
        onnx.helper.make_node("MaxPool", ["b"], ["y"], **attributes),
    ]
    model = image_model(nodes, (1, 2, 16, 16), [], ["y"])
    assert loaded(model, tmp_path).tensors["y"].shape == (1, 2, 4, 4)


def test_images_of_unknown_size_stay_what_they_are() -> None:
    model = pooled("MaxPool", {"kernel_shape": [1, 1], "ceil_mode": 1}, [8, 8], 17)
    assert not agree_on_pool(model, {})
    assert np.isin("ceil_mode", [a.name for a in model.graph.node[1].attribute])
