"""Images read in blocks of pixels: the same results, from convolutions of more channels."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from onnxsched.folding import find_stems
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model
from onnxsched.rewriting import possible_rewrites, rewritten
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support.models import feeds_for, reference
from support.nets import Net, Shape
from support.optimizing import assert_close
from support.strategies import GPU

NHWC = Variant("nhwc", fuse_conv_bias=True)


def stem(shape: Shape = (1, 3, 8, 10), kernel: int = 7, pads: tuple[int, ...] = (3,) * 4) -> Model:
    """A stem that says nothing of padding where it has none."""
    net = Net(shape)
    inputs = ["x", net.store(4, shape[1], kernel, kernel), net.store(4)]
    said: dict[str, Any] = {"pads": list(pads)} if any(pads) else {}
    y = net.add("Conv", *inputs, count=4, strides=[2, 2], **said)
    made = [
        (size + pads[axis] + pads[axis + 2] - kernel) // 2 + 1
        for axis, size in enumerate(shape[2:])
    ]
    net.shapes[y] = (shape[0], 4, made[0], made[1])
    net.conv(y, 4, 1)
    return net.model()


@st.composite
def stems(draw: DrawFn) -> Model:
    height, width = (2 * draw(st.integers(3, 8)) for _ in range(2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), height, width)
    kernel = draw(st.integers(3, 6))
    pads = tuple(draw(st.integers(0, kernel - 1)) for _ in range(4))
    pads = draw(st.sampled_from([pads, pads, (0,) * 4]))
    return stem(shape, kernel, pads)


@given(stems())
@settings(deadline=None, max_examples=60)
def test_results_stay_what_they_were(model: Model) -> None:
    feeds = feeds_for(model.proto, seed=1)
    result = rewritten(model, "folded")
    onnx.checker.check_model(result.proto, full_check=True)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds))
    assert result.proto == rewritten(model, "folded").proto
    assert result.proto.graph.output == model.proto.graph.output
    assert not find_stems(GraphView(result))


def test_blocks_have_16_channels_and_a_quarter_of_the_filters_size() -> None:
    (found,) = find_stems(GraphView(stem()))
    assert found.kernel == (4, 4)
    assert found.pads == (2, 2, 1, 1)
    result = rewritten(stem(), "folded")
    (blocks,) = (n for n in result.proto.graph.node if n.op_type == "Gather")
    assert result.tensors[blocks.output[0]].shape == (1, 16, 4, 5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(stem((1, 3, 9, 10)), id="an odd number of rows"),
        pytest.param(stem((1, 8, 8, 10)), id="channels enough"),
        pytest.param(stem(kernel=2, pads=(0,) * 4), id="a kernel of one block"),
        pytest.param(stem((1, 3, 512, 514)), id="too many places to store"),
    ],
)
def test_others_are_left_alone(model: Model) -> None:
    assert not find_stems(GraphView(model))


@pytest.mark.parametrize("shape", [(1, 4, 8, 10), (1, 3, 512, 512), (4, 3, 256, 256)])
def test_as_many_channels_and_places_as_allowed_are_taken(shape: Shape) -> None:
    assert find_stems(GraphView(stem(shape)))


def test_it_is_tried_channels_last() -> None:
    assert possible_rewrites(stem(), GPU, NHWC).alike[-1].endswith("folded")
    assert "folded" not in "".join(possible_rewrites(stem(), GPU, DEFAULT_VARIANT).alike)
