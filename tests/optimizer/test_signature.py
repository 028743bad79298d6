"""Equal operators have equal signatures; whatever their time depends on sets them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxsched.profiling.signature import OperatorSignatures
from support.models import Array, model_of, weight
from support.optimizing import as_it_is, parsed
from support.simplifying import written


def signature(text: str, opset: int = 17, **weights: Array) -> str:
    """Of the last node."""
    model = parsed(text, opset=opset)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return OperatorSignatures(as_it_is(model)).of(model.graph.node[-1])


CONV = "(float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }"
BASE = signature(CONV, w=weight(4, 3, 3, 3))


def test_names_and_the_values_of_weights_do_not_matter() -> None:
    renamed = "(float[1,3,8,8] p) => (float[1,4,6,6] q) { [named] q = Conv(p, k) }"
    assert signature(renamed, k=weight(4, 3, 3, 3)) == BASE
    assert signature(CONV, w=weight(4, 3, 3, 3) + 1) == BASE
    inside = "(float[1,3,8,8] x) => (float[1,4,6,6] y) { a = Relu(x)  y = Conv(a, w) }"
    assert signature(inside, w=weight(4, 3, 3, 3)) == BASE


def test_the_order_of_attributes_does_not_matter() -> None:
    start = "(float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv<"
    one, other = "group = 1, strides = [1,1]", "strides = [1,1], group = 1"
    first = signature(f"{start}{one}>(x, w) }}", w=weight(4, 3, 3, 3))
    assert first == signature(f"{start}{other}>(x, w) }}", w=weight(4, 3, 3, 3))
    assert first != BASE


@pytest.mark.parametrize(
    ("text", "opset", "kernel"),
    [
        (CONV.replace("Conv(", "Conv<dilations = [1,1]>("), 17, (4, 3, 3, 3)),
        (CONV.replace("[1,3,8,8]", "[2,3,8,8]"), 17, (4, 3, 3, 3)),
        (CONV, 17, (4, 3, 1, 3)),
        (CONV.replace("Conv(", "ConvInteger("), 17, (4, 3, 3, 3)),
        (CONV.replace("float[", "float16["), 17, (4, 3, 3, 3)),
        (CONV, 10, (4, 3, 3, 3)),
        (CONV.replace("Conv(", "local.Conv("), 17, (4, 3, 3, 3)),
        (CONV.replace("Conv(x, w)", "Conv(w, x)"), 17, (4, 3, 3, 3)),
    ],
    ids=["attribute", "shape", "kernel", "operator", "type", "opset", "domain", "order"],
)
def test_what_matters_sets_operators_apart(text: str, opset: int, kernel: tuple[int, ...]) -> None:
    assert signature(text, opset, w=weight(*kernel)) != BASE


def test_small_weights_may_be_shapes_so_their_values_matter() -> None:
    text = "(float[6,4] x) => (float[4,6] y) { y = Expand(x, s) }"
    first = signature(text, s=np.array([6, 4]))
    assert first == signature(text, s=np.array([6, 4]))
    assert first != signature(text, s=np.array([1, 4]))


def test_large_weights_count_by_type_only() -> None:
    text = "(int64[999] x) => (int64[999] y) { y = Add(x, w) }"
    assert signature(text, w=np.arange(999)) == signature(text, w=np.arange(999) + 5)
    assert signature(text, w=np.arange(999)) != signature(text, w=np.arange(999, dtype=np.int32))


def test_a_weight_and_a_tensor_of_its_type_differ() -> None:
    flowing = "(float[9] x, float[9] w) => (float[9] y) { y = Add(x, w) }"
    fixed = "(float[9] x) => (float[9] y) { y = Add(x, w) }"
    assert signature(flowing) != signature(fixed, w=weight(9))


def test_an_input_left_out_differs_from_one_given() -> None:
    given = "(float[9] x, float low) => (float[9] y) { y = Clip(x, low) }"
    left_out = '(float[9] x, float low) => (float[9] y) { y = Clip(x, "", low) }'
    assert signature(given) != signature(left_out)


def test_an_output_left_out_differs_from_one_given() -> None:
    pool = "(float[1,1,8,8] x) => (float[1,1,7,7] y) { %s = MaxPool<kernel_shape = [2,2]>(x) }"
    assert signature(pool % "y") != signature(pool % "y, at")


@pytest.mark.parametrize(
    ("text", "kernel", "flops", "nbytes"),
    [
        ("(float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }", (4, 3, 3, 3),
         2 * 4 * 36 * 27, 4 * (192 + 108 + 144)),
        ("(float[1,3,6,6] x) => (float[1,4,8,8] y) { y = ConvTranspose(x, w) }", (3, 4, 3, 3),
         2 * 3 * 36 * 4 * 9, 4 * (108 + 108 + 256)),
        ("(float[5,7] x) => (float[5,9] y) { y = MatMul(x, w) }", (7, 9),
         2 * 5 * 9 * 7, 4 * (35 + 63 + 45)),
        ("(float[7,5] x) => (float[5,9] y) { y = Gemm<transA = 1>(x, w) }", (7, 9),
         2 * 5 * 9 * 7, 4 * (35 + 63 + 45)),
        ("(float[5,7] x) => (float[5,7] y) { y = Relu(x) }", (1,), 35, 4 * 70),
        ("(float[5,7] x) => (float[5,7] y) { y = Add(x, x) }", (1,), 35, 4 * 70),
        ("(int64[5] i) => (float[5,9] y) { y = Gather(w, i) }", (1000, 9), 45, 4 * 90),
    ],
    ids=["convolution", "transposed convolution", "product", "transposed", "element-wise",
         "read twice", "gather"],
)  # fmt: skip
def test_operations_and_bytes(text: str, kernel: tuple[int, ...], flops: int, nbytes: int) -> None:
    model = model_of(text, w=weight(*kernel))
    signatures = OperatorSignatures(as_it_is(model))
    node = model.graph.node[0]
    assert (signatures.flop_count(node), signatures.nbytes(node)) == (flops, nbytes)


def test_operations_of_a_quantized_convolution() -> None:
    text = """(uint8[1,3,8,8] x) => (uint8[1,4,6,6] y) {
        y = QLinearConv(x, s, z, w, s, z, s, z)
    }"""
    filters = np.zeros((4, 3, 3, 3), np.uint8)
    model = parsed(text, w=filters, s=np.array(1.0, np.float32), z=np.array(0, np.uint8))
    [node] = model.graph.node
    assert OperatorSignatures(as_it_is(model)).flop_count(node) == 2 * 4 * 36 * 27


def test_operations_of_products_by_head() -> None:
    text = """(float[7,2,5] x, float[2,7,9] z) => (float[2,5,9] y) {
        y = com.microsoft.FusedMatMul<transA = 1, transBatchA = 1>(x, z)
    }"""
    model = written(text)
    [node] = model.graph.node
    assert OperatorSignatures(as_it_is(model)).flop_count(node) == 2 * 2 * 5 * 9 * 7


@pytest.mark.parametrize("turned", [0, 1])
def test_operations_of_products_of_a_vector(turned: int) -> None:
    text = f"""(float[4] x) => (float[5] y) {{
        y = com.microsoft.FusedMatMul<transA = {turned}>(x, w)
    }}"""
    model = written(text, w=weight(4, 5))
    [node] = model.graph.node
    assert OperatorSignatures(as_it_is(model)).flop_count(node) == 2 * 5 * 4


def test_what_is_not_known_counts_nothing() -> None:
    model = onnx.shape_inference.infer_shapes(
        parsed("(float[4] x) => (int64[1,n] y) { y = NonZero(x) }")
    )
    signatures = OperatorSignatures(as_it_is(model))
    assert signatures.nbytes(model.graph.node[0]) == 16
    assert signatures.shape("y") == ()


def test_another_library_makes_other_custom_operators_but_leaves_the_rest(tmp_path: Path) -> None:
    """A rebuilt one is another, a copy elsewhere is not."""
    library, copy, rebuilt = (tmp_path / name for name in ("a.so", "b.so", "c.so"))
    library.write_bytes(b"kernels")
    copy.write_bytes(b"kernels")
    rebuilt.write_bytes(b"faster kernels")
    text = "(float[2] x) => (float[2] z) { y = local.Op(x)  z = Relu(y) }"
    model = as_it_is(parsed(text))
    paths = ((), (str(library),), (str(copy),), (str(rebuilt),))
    none, first, again, other = (OperatorSignatures(model, libraries) for libraries in paths)
    custom, relu = model.proto.graph.node
    assert first.of(custom) == again.of(custom)
    assert len({signatures.of(custom) for signatures in (none, first, other)}) == 3
    assert len({signatures.of(relu) for signatures in (none, first, other)}) == 1
