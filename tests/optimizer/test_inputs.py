"""Seeded inputs that a model accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsched import inputs
from onnxsched.inputs import random_array, random_blamed, random_inputs, repeated_array
from onnxsched.shapes import tensor_types
from onnxsched_runtime.errors import ModelError, RunError, UsageError
from onnxsched_runtime.tensor import TensorType
from support.models import MODELS, Array, reference, weight
from support.optimizing import parsed

ROWS = 50

GATHERS = {
    "directly": "y = Gather(table, i)",
    "after a cast": "a = Cast<to = 7>(i)  y = Gather(table, a)",
    "after a slice": "a = Slice(i, zero, one)  y = Gather(table, a)",
    "after a split": "a, b = Split<axis = 1>(i)  y = Gather(table, b)",
    "after a long chain": """
        a = Cast<to = 6>(i)
        b = Transpose(a)
        c = Unsqueeze(b, zero)
        d = Squeeze(c, zero)
        e, f = Split<axis = 1>(d)
        g = Slice(f, zero, one)
        h = Flatten(g)
        k = Identity(h)
        y = Gather(table, k)
    """,
}


def drawn(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    return random_inputs(model, tensor_types(model), seed)


@pytest.mark.parametrize("how", GATHERS)
def test_indices_cover_their_table_and_stay_in_it(how: str) -> None:
    model = parsed(
        f"(int64[40,40] i) => (float y) {{ {GATHERS[how]} }}",
        table=weight(ROWS, 2),
        zero=np.array([0]),
        one=np.array([1]),
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    indices = drawn(model)["i"]
    assert (indices.min(), indices.max()) == (0, ROWS - 1)
    reference(model, {"i": indices})


def test_the_smallest_table_counts() -> None:
    model = parsed(
        """(int64[400] i) => (float[400,2] y) {
            a = Gather(large, i)
            b = Gather<axis = 1>(wide, i)
            c = Transpose(b)
            d = Gather(larger, i)
            y = Sum(a, c, d)
        }""",
        large=weight(ROWS, 2),
        wide=weight(2, 9),
        larger=weight(2 * ROWS, 2),
    )
    assert drawn(model)["i"].max() == 8
    reference(model, drawn(model))


def test_integers_that_index_nothing_are_0_or_1() -> None:
    model = parsed(
        "(int64[99] i, float[99] x) => (float[99] y) { a = Cast<to = 1>(i)  y = Add(a, x) }"
    )
    assert set(drawn(model)["i"]) == {0, 1}


def test_equal_seeds_give_equal_inputs_and_others_do_not() -> None:
    model = MODELS["two_towers"]()
    first, again, other = drawn(model, 5), drawn(model, 5), drawn(model, 6)
    assert first.keys() == {"left", "right"}
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_weights_among_the_inputs_are_not_drawn() -> None:
    model = parsed("(float[3] x, float[3] w) => (float[3] y) { y = Add(x, w) }", w=weight(3))
    assert drawn(model).keys() == {"x"}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_accepts_its_inputs(name: str) -> None:
    model = MODELS[name]()
    for seed in range(4):
        reference(model, drawn(model, seed))


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)])
@pytest.mark.parametrize(
    "element", [code for name, code in TensorProto.DataType.items() if name != "UNDEFINED"]
)
def test_every_type_has_values(element: int, shape: tuple[int, ...]) -> None:
    array = random_array(TensorType(element, shape), np.random.default_rng(0), 2)
    assert array.shape == shape
    assert array.dtype == onnx.helper.tensor_dtype_to_np_dtype(element)


def test_floats_are_normal_and_integers_below_their_limit() -> None:
    generator = np.random.default_rng(0)
    floats = random_array(TensorType(TensorProto.FLOAT, (10_000,)), generator)
    assert abs(floats.mean()) < 0.05
    assert abs(floats.std() - 1) < 0.05
    integers = random_array(TensorType(TensorProto.INT32, (1000,)), generator, 7)
    assert set(integers) == set(range(7))
    booleans = random_array(TensorType(TensorProto.BOOL, (100,)), generator)
    assert set(booleans) == {False, True}


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.STRING])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (3, 5, 4)])
def test_what_is_only_timed_repeats_what_was_drawn(
    element: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = TensorType(element, shape)
    drawn = random_array(kind, np.random.default_rng(0))
    monkeypatch.setattr(inputs, "_DRAWN_COUNT", 7)
    array = repeated_array(kind, np.random.default_rng(0))
    assert (array.shape, array.dtype) == (drawn.shape, drawn.dtype)
    flat = array.ravel()
    assert np.array_equal(flat[:7], drawn.ravel()[:7])
    assert np.array_equal(flat[7:], flat[: max(0, flat.size - 7)])


def test_what_is_given_is_not_drawn_and_changes_nothing_else() -> None:
    model = MODELS["two_towers"]()
    left = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    found = random_inputs(model, tensor_types(model), 5, {"left": left})
    np.testing.assert_array_equal(found["left"], left)
    assert found["left"].flags.c_contiguous
    np.testing.assert_array_equal(found["right"], drawn(model, 5)["right"])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("middle", np.zeros(3, np.float32), "no input 'middle'; the inputs are ['left', 'right']"),
        ("left", np.zeros((2, 4), np.float32), "takes shape [2, 3], got [2, 4]"),
        ("left", np.zeros((2, 3)), "takes float32, got float64"),
        ("left", [[1.0], [2.0, 3.0]], "'left' can't be read ("),
    ],
)
def test_what_is_given_must_fit(name: str, value: Any, reason: str) -> None:
    model = MODELS["two_towers"]()
    with pytest.raises(UsageError) as caught:
        random_inputs(model, tensor_types(model), 0, {name: value})
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", [np.zeros(2), np.array([1, 2]), np.array([b"a", b"b"])])
def test_strings_are_taken_and_nothing_else_for_them(value: Array) -> None:
    kind = {"x": TensorType(TensorProto.STRING, (2,))}
    declared = helper.make_tensor_value_info("x", TensorProto.STRING, [2])
    model = helper.make_model(helper.make_graph([], "strings", [declared], []))
    found = random_inputs(model, kind, 0, {"x": np.array(["a", "b"])})["x"]
    assert (found.dtype, found.tolist()) == (np.dtype(object), ["a", "b"])
    with pytest.raises(UsageError, match="takes strings, got"):
        random_inputs(model, kind, 0, {"x": value})


def test_tensors_of_torch_are_taken() -> None:
    import torch

    model = MODELS["two_towers"]()
    left = torch.ones(2, 3, requires_grad=True)
    given: dict[str, Any] = {"left": left}
    found = random_inputs(model, tensor_types(model), 0, given)["left"]
    np.testing.assert_array_equal(found, np.ones((2, 3), np.float32))


@pytest.mark.parametrize(("given", "is_blamed"), [("", True), ("x", True), ("xz", False)])
def test_random_inputs_are_blamed_unless_all_were_given(given: str, is_blamed: bool) -> None:
    with (
        pytest.raises(RunError) as caught,
        random_blamed("xz", dict.fromkeys(given, np.zeros(1))),
    ):
        raise RunError("It failed.")
    sentence = "The model fails on random inputs (It failed); give real ones with --input "
    assert str(caught.value).startswith(sentence if is_blamed else "It failed.")


def test_random_inputs_are_not_blamed_for_other_errors() -> None:
    with pytest.raises(ModelError, match=r"^Refused\.$"), random_blamed("x", {}):
        raise ModelError("Refused.")
