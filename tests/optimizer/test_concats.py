"""Concats of Concats are one, where nothing else sees what the first has joined."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sample_models import build
from support.simplifying import assert_equivalent, op_counts, op_types, simplified, written


def model_of(body: str, outputs: str = "") -> str:
    return f"(float[2,3] a, float[2,3] b, float[2,3] c) => (float[n,m] y{outputs}) {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("d = Concat<axis = 1>(a, b) y = Concat<axis = 1>(d, c)", ["a", "b", "c"]),
        ("d = Concat<axis = 1>(a, b) y = Concat<axis = 1>(c, d)", ["c", "a", "b"]),
        ("d = Concat<axis = -1>(a, a) y = Concat<axis = -1>(a, d, a)", ["a", "a", "a", "a"]),
        (
            "d = Concat<axis = 0>(a, b) e = Concat<axis = 0>(d, c) y = Concat<axis = 0>(e, a)",
            ["a", "b", "c", "a"],
        ),
    ],
)
def test_all_is_joined_at_once(body: str, inputs: list[str]) -> None:
    model = written(model_of(body))
    changed = simplified(model)
    [node] = changed.graph.node
    assert list(node.input) == inputs
    assert_equivalent(changed, model, relative=0)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("d = Concat<axis = 1>(a, b) y = Concat<axis = 1>(d, d)", ""),
        ("d = Concat<axis = 0>(a, b) e = Concat<axis = 0>(c, c) y = Concat<axis = 1>(d, e)", ""),
        ("d = Concat<axis = 1>(a, b) y = Concat<axis = 1>(d, c)", ", float[2,6] d"),
        ("d = Concat<axis = 1>(a, b) z = Relu(d) y = Concat<axis = 1>(d, c)", ", float[2,6] z"),
        (
            f"d = Concat<axis = 1>({', '.join('a' * 31)}) y = Concat<axis = 1>(d, b, c)",
            "",
        ),
    ],
    ids=["twice", "other axis", "output", "read", "many"],
)
def test_what_is_seen_otherwise_stays(body: str, outputs: str) -> None:
    model = written(model_of(body, outputs))
    assert op_types(simplified(model)) == op_types(model)


def test_inception_has_one_concat_a_module() -> None:
    model = build("inception_v3", image=75)
    changed = simplified(model)
    assert op_counts(model)["Concat"] - op_counts(changed)["Concat"] == 4
    assert_equivalent(changed, model)


SCALED = "z = Concat<axis = 1>(d, e) y = BatchNormalization<epsilon = 0.01>(z, s, o, m, v)"
CONVS = "d = Conv(x, w) e = Conv<pads = [1, 1, 1, 1]>(x, k, b)"


def scaled_model(body: str, outputs: str = "") -> onnx.ModelProto:
    random = np.random.default_rng(0)
    sizes = {"w": (2, 3, 1, 1), "k": (4, 3, 3, 3), "b": (4,), "g": (6, 3, 1, 1), "h": (3, 3, 1, 1)}
    sizes |= dict.fromkeys("somv", (6,))
    weights = {name: random.random(size).astype(np.float32) for name, size in sizes.items()}
    text = f"(float[2,3,5,5] x) => (float[n,c,h,w] y{outputs}) {{ {body} }}"
    return written(text, **weights)


def test_what_scales_a_concat_is_done_by_the_convolutions_before_it() -> None:
    model = scaled_model(f"{CONVS} {SCALED}")
    changed = simplified(model)
    assert op_types(changed) == ["Conv", "Conv", "Concat"]
    assert_equivalent(changed, model)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{CONVS} {SCALED}", ", float[n,c,h,w] z"),
        (f"{CONVS} u = Neg(d) {SCALED}", ", float[n,c,h,w] u"),
        (f"d = Conv(x, w) e = ConvTranspose(x, q) {SCALED}", ""),
        (f"d = Conv(x, g) e = Conv(x, g) {SCALED.replace('axis = 1', 'axis = 2')}", ""),
        (f"d = Conv(x, h) {SCALED.replace('(d, e)', '(d, d)')}", ""),
    ],
    ids=["output", "read", "other", "axis", "twice"],
)
def test_what_scales_something_else_too_stays(body: str, outputs: str) -> None:
    model = scaled_model(body, outputs)
    if "q)" in body:
        weight = np.ones((3, 4, 1, 1), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "q"))
    assert op_types(simplified(model)) == op_types(model)
