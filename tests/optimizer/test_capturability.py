"""Which operators stay on the host, each with its reason; and what is drawn at random."""

from __future__ import annotations

import pytest

from onnxsched.capturability import host_reasons, random_tensors
from onnxsched.shapes import tensor_types
from support.models import MODELS
from support.optimizing import parsed


def reasons_of(text: str, opset: int = 17) -> dict[str, str]:
    """Reasons by operator type."""
    model = parsed(text, opset=opset)
    for node in model.graph.node:
        node.name = node.op_type
    return host_reasons(model, tensor_types(model), {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("branch", {"If_2": "If decides at run time what to execute"}),
        (
            "loop",
            {
                "Loop_2": "Loop decides at run time what to execute",
                "Neg_3": "the shape of 'sum' depends on the data",
            },
        ),
        (
            "sequence",
            {
                "SequenceConstruct_2": "'parts' is a sequence or optional",
                "SequenceAt_3": "'parts' is a sequence or optional",
                "SequenceConstruct_4": "'hidden' is a sequence or optional",
                "ConcatFromSequence_5": "'hidden' is a sequence or optional",
                "Sigmoid_6": "the shape of 'all' depends on the data",
            },
        ),
        (
            "data_dependent",
            {
                "Compress_1": "the shape of 'some' depends on the data",
                "Neg_2": "the shape of 'some' depends on the data",
                "NonZero_3": "the shape of 'at' depends on the data",
                "ReduceSum_4": "the shape of 'kept' depends on the data",
            },
        ),
    ],
)
def test_each_operator_that_stays_on_the_host_has_its_reason(
    name: str, expected: dict[str, str]
) -> None:
    model = MODELS[name]()
    assert host_reasons(model, tensor_types(model), {}) == expected


@pytest.mark.parametrize(
    "name", ["chain", "diamond", "fork_join", "two_towers", "split", "optional_input"]
)
def test_static_operators_have_no_reason(name: str) -> None:
    model = MODELS[name]()
    assert host_reasons(model, tensor_types(model), {}) == {}


def test_scan_decides_at_run_time() -> None:
    found = reasons_of(
        """(float[4,3] x, float[3] start) => (float[3] y) {
            y, all = Scan<num_scan_inputs = 1,
                body = body (float[3] sum, float[3] row) => (float[3] next, float[3] out) {
                    next = Add(sum, row)
                    out = Identity(next)
                }>(start, x)
        }"""
    )
    assert found == {"Scan": "Scan decides at run time what to execute"}


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_operators_of_others_may_be_called_the_same(kind: str) -> None:
    assert reasons_of(f"(float[3] x) => (float[3] y) {{ y = local.{kind}(x) }}") == {}


@pytest.mark.parametrize(
    "operator",
    [
        "RandomNormal<shape = [3]>()",
        "RandomUniform<shape = [3]>()",
        "RandomNormalLike(x)",
        "RandomUniformLike(x)",
        "Bernoulli(x)",
    ],
)
def test_a_replay_would_repeat_random_numbers(operator: str) -> None:
    found = reasons_of(f"(float[3] x) => (float[3] y) {{ a = Neg(x)  y = {operator} }}")
    kind = operator.partition("<")[0].partition("(")[0]
    assert found == {kind: f"{kind} draws numbers that a replay would repeat"}


def test_strings_have_no_device_buffers() -> None:
    found = reasons_of("(string[2] x) => (string[2] y) { y = StringConcat(x, x) }", opset=20)
    assert found == {"StringConcat": "'x' holds strings"}


def test_types_without_device_buffers_stay_on_the_host() -> None:
    found = reasons_of("(complex64[2] x) => (complex64[2] y) { y = Identity(x) }")
    assert found == {"Identity": "'x' is of a type without device buffers"}


def test_optionals_stay_on_the_host() -> None:
    found = reasons_of("(float[2] x) => (optional(float[2]) y) { a = Neg(x)  y = Optional(a) }")
    assert found == {"Optional": "'y' is a sequence or optional"}


def test_what_only_the_cpu_provider_has_stays_on_the_host() -> None:
    model = MODELS["chain"]()
    found = host_reasons(model, tensor_types(model), {"Add_1": "Add"})
    assert found == {"Add_1": "ONNX Runtime runs Add on the CPU"}


def test_random_numbers_reach_what_is_computed_from_them() -> None:
    model = parsed(
        """(float[3] x, bool flag) => (float[3] y, float[3] z) {
            a = Neg(x)
            b = RandomNormalLike(a)
            c = Add(b, a)
            d = Exp(a)
            y = If(flag) <
                then_branch = yes () => (float[3] u) { u = Neg(c) },
                else_branch = no () => (float[3] v) { v = Neg(d) }
            >
            z = Cos(d)
        }"""
    )
    assert random_tensors(model) == {"b", "c", "y"}


def test_random_numbers_are_found_inside_branches() -> None:
    model = parsed(
        """(float[3] x, bool flag) => (float[3] y) {
            y = If(flag) <
                then_branch = yes () => (float[3] u) { u = RandomNormalLike(x) },
                else_branch = no () => (float[3] v) { v = Neg(x) }
            >
        }"""
    )
    assert random_tensors(model) == {"y"}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_draw_nothing(name: str) -> None:
    assert random_tensors(MODELS[name]()) == set()
