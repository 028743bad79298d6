"""Concats of Concats are one, where nothing else sees what the first has joined."""

from __future__ import annotations

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
