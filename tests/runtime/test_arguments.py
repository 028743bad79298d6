"""Host values are taken as they are, made dense, or refused; types are called as by ORT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.arguments import NodeArg, arguments_of, host_array, zeros
from onnxsched_runtime.errors import UsageError
from support.models import plain_session

TYPES = {"float": "f4", "float16": "f2", "double": "f8", "int64": "i8", "uint8": "u1", "bool": "?"}


@settings(deadline=None)
@given(data=st.data())
def test_a_value_fits_if_it_would_be_taken_as_it_is(data: st.DataObject) -> None:
    shapes = st.sampled_from([(), (2,), (2, 3), (3, 2), (0, 3), (1, 3)])
    kind = data.draw(st.sampled_from(list(TYPES)))
    argument = NodeArg("x", f"tensor({kind})", list(data.draw(shapes)))
    order = data.draw(st.sampled_from("<>"))
    value = np.zeros(data.draw(shapes), order + data.draw(st.sampled_from(list(TYPES.values()))))
    change = data.draw(st.sampled_from([None, "transposed", "reversed", "read-only"]))
    value = value.T if change == "transposed" else value
    value = value[::-1] if change == "reversed" and value.ndim else value
    value.flags.writeable = change != "read-only"
    is_right = list(value.shape) == argument.shape and value.dtype == np.dtype(TYPES[kind])
    if not is_right:
        assert not argument.fits(value)
        with pytest.raises(UsageError):
            host_array(argument, value)
        return
    taken = host_array(argument, value)
    np.testing.assert_array_equal(taken, value)
    assert taken.flags.c_contiguous
    assert taken.shape == value.shape
    assert (taken is value) == argument.fits(value)


@pytest.mark.parametrize("kind", ["tensor(float)", "tensor(string)", "seq(tensor(float))"])
def test_a_value_of_a_shape_that_is_not_known_is_looked_at_each_time(kind: str) -> None:
    argument = NodeArg("x", kind, None)
    value: Any = np.array(["a"], object) if "string" in kind else np.zeros(3, np.float32)
    assert not argument.fits(value)
    assert host_array(argument, value) is value
    with pytest.raises(UsageError, match="'x' has no fixed shape; give it a value"):
        zeros(argument)


def test_what_is_no_tensor_is_left_to_ort() -> None:
    argument = NodeArg("x", "seq(tensor(float))", [2])
    parts = [np.zeros(2, np.float32)]
    assert host_array(argument, parts) is parts
    assert not argument.fits(np.zeros(2, np.float32))
    with pytest.raises(UsageError, match="no fixed shape"):
        zeros(argument)


def test_what_may_be_missing_and_maps_are_called_as_by_ort() -> None:
    numbers = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    sequence = helper.make_sequence_type_proto(numbers)
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.STRING, numbers))
    inputs = [
        helper.make_value_info("a", helper.make_optional_type_proto(numbers)),
        helper.make_value_info("b", helper.make_optional_type_proto(sequence)),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 2]),
    ]
    nodes = [
        helper.make_node("OptionalHasElement", ["a"], ["has_a"]),
        helper.make_node("OptionalHasElement", ["b"], ["has_b"]),
        helper.make_node(
            "ZipMap",
            ["scores"],
            ["named"],
            domain="ai.onnx.ml",
            classlabels_strings=["cat", "dog"],
        ),
    ]
    flags = [helper.make_tensor_value_info(f"has_{t}", TensorProto.BOOL, []) for t in "ab"]
    outputs = [*flags, helper.make_value_info("named", maps)]
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "types", inputs, outputs)
    plain = plain_session(helper.make_model(graph, opset_imports=domains, ir_version=10))
    for values, theirs in ((inputs, plain.get_inputs()), (outputs, plain.get_outputs())):
        ours = arguments_of(values, Annotation({}, {}, {}))
        assert [argument.type for argument in ours] == [argument.type for argument in theirs]


def test_zeros_are_of_the_type_and_shape() -> None:
    for kind, name in TYPES.items():
        value = zeros(NodeArg("x", f"tensor({kind})", [2, 0]))
        assert value.shape == (2, 0)
        assert value.dtype == np.dtype(name)
