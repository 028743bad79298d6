"""What computes nothing becomes nodes of our domain, which say where numbers lie."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnxsched_runtime.fusing import fused
from onnxsched_runtime.model import FUSED_DOMAIN
from onnxsched_runtime.moves import FINEST_NBYTES, Cut, Joined, Reordered, left_in_place
from onnxsched_runtime.moving import moved, moved_nodes
from onnxsched_runtime.pooling import pooled
from onnxsched_runtime.source import ModelSource
from support.fused import Lowered, evaluated, feeds_for, lowered_models
from support.models import Array


def kinds(source: ModelSource) -> list[str]:
    """The operators of a model, those of our domain marked."""
    return [
        f"our {node.op_type}" if node.domain == FUSED_DOMAIN else node.op_type
        for node in source.model.graph.node
    ]


@settings(deadline=None, max_examples=200)
@given(source=lowered_models())
def test_a_model_computes_the_same(source: ModelSource) -> None:
    source = pooled(fused(source))  # which may sum averages in another order, as moves do not
    before = source.model.SerializeToString()
    feeds = feeds_for(source)
    after = moved(source)
    expected, actual = evaluated(source, feeds), evaluated(after, feeds)
    for value in source.model.graph.output:
        np.testing.assert_array_equal(actual[value.name], expected[value.name])
    for name in [tensor for node in after.model.graph.node for tensor in node.output]:
        assert after.tensors[name].shape == actual[name].shape
    assert source.model.SerializeToString() == before


@settings(deadline=None, max_examples=200)
@given(source=lowered_models())
def test_a_move_is_described_as_it_is_done(source: ModelSource) -> None:
    after = moved(source)
    values = {name: np.float32(v) for name, v in evaluated(after, feeds_for(source)).items()}
    for move in moved_nodes(after).values():
        expected = values[move.output]
        if isinstance(move, Reordered):
            read = values[move.source].ravel()[move.start :]
            strides = [4 * step for step in move.strides]
            actual: Array = np.lib.stride_tricks.as_strided(read, move.shape, strides)
            np.testing.assert_array_equal(actual, expected)
        elif isinstance(move, Cut):
            piece = values[move.source].tobytes()[move.start_nbytes :][: move.nbytes]
            assert piece == expected.tobytes()
        else:
            for part, start in zip(move.parts, move.starts_nbytes, strict=True):
                there = expected.tobytes()[start:][: values[part].nbytes]
                assert there == values[part].tobytes()


@settings(deadline=None, max_examples=200)
@given(source=lowered_models())
def test_what_is_joined_lies_there_alone_and_begins_where_kernels_may(source: ModelSource) -> None:
    after = moved(source)
    graph = after.model.graph
    joined = [move for move in moved_nodes(after).values() if isinstance(move, Joined)]
    parts = Counter(part for move in joined for part in move.parts)
    assert set(parts.values()) <= {1}
    ends = {value.name for value in (*graph.input, *graph.output)}
    assert ends.isdisjoint(parts)
    assert all(start % FINEST_NBYTES == 0 for move in joined for start in move.starts_nbytes)


def test_rows_of_one_image_are_cut_and_joined_in_place() -> None:
    net = Lowered((1, 8, 4, 4))
    upper, lower = (net.conv(net.cut("x", 1, start, start + 5), 4, 3) for start in (0, 3))
    parts = [net.cut(upper, 1, 0, 4), net.cut(lower, 1, 1, 5)]
    net.add("Relu", [net.add("Concat", parts, axis=1)])
    after = moved(fused(net.source(net.nodes[-1].output[0])))
    assert kinds(after) == ["our Slice", "our Conv"] * 2 + ["our Slice"] * 2 + ["our Concat"]


def test_two_images_have_no_neighbouring_rows() -> None:
    net = Lowered((2, 4, 4, 4))
    halves = [net.cut("x", 1, start, start + 2) for start in (0, 2)]
    source = net.source(net.add("Concat", halves, axis=1))
    assert kinds(moved(source)) == ["Slice", "Slice", "Concat"]


@pytest.mark.parametrize(("images", "is_cut"), [(1, True), (2, False)])
def test_pieces_that_leave_nothing_out_are_cut_one_by_one(images: int, is_cut: bool) -> None:
    net = Lowered((images, 5, 4, 4))
    upper, lower = net.split(net.conv("x", 4), 1, 3, 2)
    source = net.source(net.conv(upper, 4), net.conv(lower, 4))
    net.nodes[2].name = f"{net.nodes[1].name}/piece0"  # what one would be called
    after = moved(fused(source))
    nodes = [node for node in after.model.graph.node if node.op_type == "Slice"]
    assert kinds(after)[1:-2] == (["our Slice"] * 2 if is_cut else ["Split"])
    assert [node.output[0] for node in nodes] == ([upper, lower] if is_cut else [])
    assert len({node.name for node in after.model.graph.node}) == len(after.model.graph.node)
    moves = moved_nodes(after)
    assert [(m.start_nbytes, m.nbytes) for m in moves.values() if isinstance(m, Cut)] == (
        [(0, 192), (192, 128)] if is_cut else []
    )
    assert left_in_place(moves, source.ends) == {node.name for node in nodes}


def test_pieces_that_begin_where_no_kernel_may_are_left_to_one_kernel() -> None:
    net = Lowered((1, 5, 1, 2))
    net.add("Concat", net.split("x", 1, 1, 2, 2)[::-1], axis=1)
    assert kinds(moved(net.source(net.nodes[-1].output[0])))[0] == "Split"


def test_a_part_that_has_another_place_is_copied() -> None:
    net = Lowered((1, 4, 4, 4))
    image = net.conv("x", 4)
    twice = net.add("Concat", [image, image], axis=1)
    source = net.source(net.conv(twice, 4), net.conv(net.add("Concat", [image, "x"], axis=1), 4))
    after = moved(fused(source))
    assert Counter(kinds(after)) == {"our Conv": 3, "our Slice": 3, "our Concat": 2}
    whole = moved_nodes(after)
    graph = source.model.graph
    free = left_in_place(whole, {value.name for value in (*graph.input, *graph.output)})
    assert free == {name for name, move in whole.items() if isinstance(move, Joined)}


@pytest.mark.parametrize(
    ("shape", "perm", "is_slow"),
    [
        ((1, 3, 16, 16), [0, 2, 3, 1], True),
        ((1, 32, 16, 16), [0, 2, 3, 1], False),
        ((2, 32, 16, 16), [0, 2, 3, 1], False),
        ((2, 15, 16, 16), [0, 2, 3, 1], True),
        ((4, 16, 16, 3), [0, 3, 1, 2], True),
        ((32, 16, 16, 32), [1, 0, 2, 3], False),
        ((32, 16, 16, 32), [3, 2, 1, 0], False),
        ((2, 3, 16, 2, 16, 2), [0, 2, 4, 3, 5, 1], False),
        ((1, 1, 16, 16), [0, 2, 3, 1], False),
    ],
)
def test_slow_changes_of_order_are_ours(
    shape: tuple[int, ...], perm: list[int], is_slow: bool
) -> None:
    net = Lowered(shape)
    source = net.source(net.add("Transpose", ["x"], perm=perm))
    assert kinds(moved(source)) == ["our Transpose" if is_slow else "Transpose"]


@pytest.mark.parametrize("element_type", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_change_of_order_takes_in_what_is_cut_before(element_type: int) -> None:
    net = Lowered((1, 3, 8, 4), element_type=element_type)
    rows = net.cut("x", 2, 3, 7)
    after = moved(net.source(net.add("Transpose", [rows], perm=[0, 2, 3, 1])))
    assert kinds(after) == ["our Transpose"]
    (move,) = moved_nodes(after).values()
    size = 4 if element_type == TensorProto.FLOAT else 2
    assert move == Reordered(
        "x", after.model.graph.output[0].name, (1, 4, 4, 3), size, 12, (96, 4, 1, 32)
    )
    assert rows not in after.tensors
    both = net.source(net.nodes[-1].output[0], rows)
    assert kinds(moved(both)) == ["Slice", "our Transpose"]


def test_bounds_in_attributes_are_left_to_sessions() -> None:
    net = Lowered((1, 4, 4, 4))
    cut = net.cut("x", 1, 0, 2)
    source = net.source(net.conv(cut, 4))
    del source.model.graph.node[0].input[1:]
    assert kinds(moved(source))[0] == "Slice"


@given(start=st.integers(0, 3), count=st.integers(1, 5))
def test_a_piece_lies_in_its_whole_where_kernels_may_begin_and_much_of_it_is_used(
    start: int, count: int
) -> None:
    net = Lowered((1, 8, 1, 2))
    image = net.conv("x", 2)
    source = fused(net.source(net.conv(net.cut(image, 1, start, start + count), 2)))
    moves = moved_nodes(moved(source))
    assert bool(left_in_place(moves, {"x"})) == (start % 2 == 0 and count >= 4)
    assert bool(left_in_place(moves, {image})) == (start % 2 == 0)


def test_pieces_that_are_used_together_lie_in_their_whole() -> None:
    net = Lowered((1, 8, 4, 4))
    image = net.conv("x", 4)
    ends = [net.conv(net.cut(image, 1, start, start + 2), 4) for start in (0, 2, 6)]
    moves = moved_nodes(moved(fused(net.source(*ends))))
    assert left_in_place(moves, {"x", *ends}) == moves.keys()
    assert not left_in_place(dict([*moves.items()][:1]), {"x", *ends})


@pytest.mark.parametrize(("rows", "is_left"), [(8, True), (4, False)])
def test_a_piece_of_a_piece_lies_in_the_whole_unless_it_would_keep_too_much(
    rows: int, is_left: bool
) -> None:
    net = Lowered((1, 16, 4, 4))
    image = net.conv("x", 4)
    half = net.cut(image, 1, 0, 8)
    ends = [net.conv(half, 4), net.conv(net.cut(half, 1, 0, rows), 4)]
    moves = moved_nodes(moved(fused(net.source(*ends))))
    outer, inner = moves
    assert left_in_place(moves, {"x", *ends}) == ({outer, inner} if is_left else {outer})


def test_a_transpose_that_takes_in_a_slice_runs_where_that_was_scheduled() -> None:
    net = Lowered((1, 3, 8, 4))
    rows = net.cut("x", 2, 0, 4)
    source = net.source(net.add("Transpose", [rows], perm=[0, 2, 3, 1]))
    slicing, _ = source.model.graph.node
    assert [node.name for node in moved(source).model.graph.node] == [slicing.name]


@pytest.mark.parametrize("kind", ["weight", "node"])
def test_a_part_is_called_as_nothing_else_is(kind: str) -> None:
    net = Lowered((1, 4, 4, 4))
    image = net.conv("x", 4)
    joined = net.add("Concat", [image, image], axis=1)
    taken = f"{net.nodes[-1].name}/part1"
    if kind == "weight":
        net.weights[0].name = net.nodes[0].input[1] = taken
    else:
        net.nodes[0].name = taken
    graph = moved(net.source(joined)).model.graph
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names)) == 3
    written = {tensor for node in graph.node for tensor in node.output}
    assert written.isdisjoint(weight.name for weight in graph.initializer)
