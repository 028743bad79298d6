"""A variant is written and read whole, and damage is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

VARIANTS: SearchStrategy[Variant] = st.builds(
    Variant,
    layout=st.sampled_from(["nchw", "nhwc"]),
    fuse_conv_bias=st.booleans(),
    conv_search=st.sampled_from(["exhaustive", "heuristic"]),
    fuses=st.booleans(),
    tf32=st.booleans(),
)


@given(variant=VARIANTS)
def test_what_is_written_is_read(variant: Variant) -> None:
    assert Variant.from_json(json.loads(json.dumps(variant.to_json()))) == variant


@given(one=VARIANTS, other=VARIANTS)
def test_different_variants_read_differently(one: Variant, other: Variant) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        (DEFAULT_VARIANT, "nchw"),
        (Variant("nhwc"), "nhwc"),
        (Variant(fuse_conv_bias=True), "nchw+bias"),
        (Variant("nhwc", fuses=True), "nhwc+fused"),
        (
            Variant("nhwc", True, "heuristic", fuses=True, tf32=False),
            "nhwc+bias+fused+heuristic-tf32",
        ),
    ],
)
def test_it_is_short_to_read(variant: Variant, text: str) -> None:
    assert str(variant) == text


def test_missing_fields_are_defaults_and_unknown_ones_nothing() -> None:
    assert Variant.from_json({}) == DEFAULT_VARIANT
    assert Variant.from_json({"layout": "nhwc", "later": 1}) == Variant("nhwc")


@pytest.mark.parametrize(
    "content",
    [
        {"layout": "NHWC"}, {"layout": None}, {"layout": ["nhwc"]}, {"conv_search": "default"},
        {"fuse_conv_bias": 1}, {"fuses": 1}, {"fuses": None}, {"tf32": "no"}, {"tf32": None},
        [], "", "nhwc", None, 3,
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="is no variant"):
        Variant.from_json(content)
