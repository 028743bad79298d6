"""What the device reaches at best: one large matrix product and one large element-wise pass.

They are a model like any other and run through the same sessions as what they are compared with.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from onnxsched.loading import Model
from onnxsched.profile import OperatorProfile, Roofline
from onnxsched.shapes import tensor_types
from onnxsched_runtime.device import Device

_PRODUCT_SIZE = {"cuda": 4096, "cpu": 768}
_PASS_COUNT = {"cuda": 2**26, "cpu": 2**22}
"""Elements of the pass: several times the last-level cache."""


def roofline_model(device: Device) -> Model:
    """A matrix product and an element-wise pass, large enough to fill the device."""
    size, count = _PRODUCT_SIZE[device.kind], _PASS_COUNT[device.kind]
    square, flat = [size, size], [count]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "b"], ["product"], name="product"),
            helper.make_node("Abs", ["x"], ["pass"], name="pass"),
        ],
        "roofline",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, square) for n in "ab"]
        + [helper.make_tensor_value_info("x", TensorProto.FLOAT, flat)],
        [
            helper.make_tensor_value_info("product", TensorProto.FLOAT, square),
            helper.make_tensor_value_info("pass", TensorProto.FLOAT, flat),
        ],
    )
    proto: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    return Model(proto, tensor_types(proto), {}, {}, proto)


def roofline_from_profiles(
    device: Device, product: OperatorProfile, element_pass: OperatorProfile
) -> Roofline:
    """The rates that the two operators of `roofline_model` reached."""
    return Roofline(
        flops_per_us=2 * _PRODUCT_SIZE[device.kind] ** 3 / product.duration_us,
        bytes_per_us=8 * _PASS_COUNT[device.kind] / element_pass.duration_us,
    )
