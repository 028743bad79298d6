"""Bands of rows compute what the whole image does, whatever the operators and wherever cut."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsched import regions
from onnxsched.bands import Groups, banded, plan_bands
from onnxsched.graph_view import GraphView
from onnxsched.loading import Model, graph_from_model
from onnxsched.regions import find_bands, region_of
from onnxsched.rows import Rows, RowWindow, owned_rows, row_window
from onnxsched.seeding import band_of
from onnxsched.shapes import tensor_types
from sample_models import build
from support.images import cut_stacks
from support.models import Array, feeds_for, model_of, reference
from support.optimizing import as_it_is, assert_close, loaded


def covers(rows: Rows, others: Rows) -> bool:
    """Whether all of the others are among the rows."""
    return rows.start <= others.start and others.stop <= rows.stop


@settings(max_examples=300)
@given(
    span=st.integers(1, 7),
    stride=st.integers(1, 4),
    pads=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    height=st.integers(1, 30),
    data=st.data(),
)
def test_rows_read_are_those_that_a_sliding_window_touches(
    span: int, stride: int, pads: tuple[int, int], height: int, data: st.DataObject
) -> None:
    above, below = (min(pad, span) for pad in pads)
    result = (height + above + below - span) // stride + 1
    if result < 1:
        return
    window = RowWindow(span, stride, above, below)
    start = data.draw(st.integers(0, result - 1))
    rows = Rows(start, data.draw(st.integers(start + 1, result)))
    touched = {
        row * stride - above + tap for row in range(rows.start, rows.stop) for tap in range(span)
    } & set(range(height))
    read = window.reads(rows, height)
    if max(above, below) < span:  # else a window may see nothing but padding
        assert (read.start, read.stop) == (min(touched), max(touched) + 1)
    assert touched <= set(range(read.start, read.stop))
    assert read.count > 0
    wide = Rows(data.draw(st.integers(0, read.start)), data.draw(st.integers(read.stop, height)))
    written, entered = window.writes(wide, height), window.entered(wide, height)
    assert covers(written, rows)
    assert covers(wide, entered)
    padded = sum(window.pads(entered, height)) + entered.count
    assert (padded - span) // stride + 1 == written.count
    assert covers(wide, window.reads(written, height))


def test_all_rows_belong_to_one_band() -> None:
    for height in range(1, 20):
        for count in range(1, height + 1):
            owned = [owned_rows(height, count, band) for band in range(count)]
            assert [row for rows in owned for row in range(rows.start, rows.stop)] == [
                *range(height)
            ]
            assert max(r.count for r in owned) - min(r.count for r in owned) <= 1


def assert_well_formed(model: Model) -> None:
    """Every tensor typed as onnx infers it, every weight read, and names that are unique."""
    graph = model.proto.graph
    onnx.checker.check_model(model.proto, full_check=True)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    flowing = {t for node in graph.node for t in node.output if t} | {v.name for v in graph.input}
    assert model.tensors.keys() == flowing
    bare = onnx.ModelProto()
    bare.CopyFrom(model.proto)
    if all(node.domain == "" for node in graph.node):  # of others onnx infers nothing
        del bare.graph.value_info[:]
    inferred = tensor_types(bare)
    assert {name: inferred[name] for name in model.tensors} == dict(model.tensors)


def checked(model: Model, groups: Groups, count: int) -> Model:
    """The model in bands, with everything checked but what it computes."""
    before = model.proto.SerializeToString()
    result = banded(model, groups, count)
    assert model.proto.SerializeToString() == before
    assert result.proto == banded(model, groups, count).proto
    assert_well_formed(result)
    grouped = {name for group in groups for name in group}
    names = Counter(node.name for node in result.proto.graph.node)
    for node in model.proto.graph.node:
        copies = [f"{node.name}/band{band}" for band in range(count)]
        assert names[node.name] == (node.name not in grouped)
        assert all(names[copy] == (node.name in grouped) for copy in copies)
    kept = {w.name: w for w in result.proto.graph.initializer}
    assert all(
        kept[w.name] == w
        for w in model.proto.graph.initializer
        if any(
            w.name in node.input and node.op_type not in ("Pad", "Slice")
            for node in model.proto.graph.node
        )
    )
    return result


@settings(deadline=None, max_examples=250)
@given(problem=cut_stacks(is_exact=False))
def test_bands_compute_the_same_within_rounding(problem: tuple[Model, Groups, int]) -> None:
    model, groups, count = problem
    result = checked(model, groups, count)
    feeds = feeds_for(model.proto, seed=1)
    assert_close(reference(result.proto, feeds), reference(model.proto, feeds), 1e-5)


@settings(deadline=None, max_examples=250)
@given(problem=cut_stacks(is_exact=True))
def test_bands_of_whole_numbers_are_equal_bit_for_bit(problem: tuple[Model, Groups, int]) -> None:
    model, groups, count = problem
    result = banded(model, groups, count)
    rng = np.random.default_rng(2)
    shape = model.tensors["x"].shape
    assert shape is not None
    feeds: dict[str, Array] = {"x": rng.integers(-1, 2, shape).astype(np.float32)}
    for one, other in zip(
        reference(result.proto, feeds), reference(model.proto, feeds), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@settings(deadline=None, max_examples=100)
@given(problem=cut_stacks(is_exact=True))
def test_what_a_band_answers_for_it_has(problem: tuple[Model, Groups, int]) -> None:
    model, groups, count = problem
    view = GraphView(model)
    plan = plan_bands(view, groups, count)
    for tensor, rows in plan.made.items():
        height = (model.tensors[tensor].shape or ())[2]
        assert all(covers(Rows(0, height), own) for own in rows)
        if tensor in plan.joined:
            for band, own in enumerate(rows):
                assert covers(own, owned_rows(height, count, band))


ZOO = {"googlenet": 64, "inception_v3": 107, "squeezenet": 64, "nasnet_mobile": 64}
"""Sample models, and the sizes of their images."""


@pytest.fixture
def short_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images are cut as if they were large."""
    monkeypatch.setattr(regions, "_LEAST_ROWS", 4)


@pytest.mark.usefixtures("short_bands")
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ZOO)
def test_sample_models_in_bands_keep_their_outputs(name: str, count: int, tmp_path: Path) -> None:
    model = loaded(build(name, image=ZOO[name]), tmp_path)
    feeds = feeds_for(model.proto, seed=3)
    outputs = reference(model.proto, feeds)
    found = find_bands(model, count)
    assert "bands" in found
    for scheme, region in found.items():
        result = checked(model, region.groups, count)
        assert_close(reference(result.proto, feeds), outputs, 1e-5)
        assert not find_bands(result, count), scheme


def of_text(text: str, **weights: Array) -> Model:
    return as_it_is(
        model_of(f"(float[1,2,40,12] x) => (float[1,c,h,w] y) {{ {text} }}", **weights)
    )


KERNEL = np.zeros((2, 2, 3, 3), np.float32)


@pytest.mark.parametrize(
    "text",
    [
        "a = Relu(x)  y = GlobalAveragePool(a)",
        "y = AveragePool<kernel_shape = [2,2], ceil_mode = 1>(x)",
        "y, i = MaxPool<kernel_shape = [2,2]>(x)",
        "y = MaxPool<kernel_shape = [2,1], dilations = [3,1], strides = [13,1], ceil_mode = 1>(x)",
        'y = MaxPool<kernel_shape = [2,1], dilations = [2,1], auto_pad = "SAME_UPPER">(x)',
        "a = Pad(x, sides)  y = MaxPool<kernel_shape = [3,3]>(a)",
        "a = Relu(k)  y = Conv(x, a)",
        "y = Concat<axis = 2>(x, x)",
        "a = GlobalAveragePool(x)  y = Mul(x, a)",
        "y = Add(x, rows)",
        'y = Pad<mode = "reflect">(x, sides)',
        "a = Neg(sides)  y = Pad(x, a)",
        "y = Conv<pads = [4,0,0,0]>(x, k)",
        "y = Transpose<perm = [0,1,3,2]>(x)",
        "y = Softmax<axis = 2>(x)",
    ],
)
def test_what_has_no_rows_of_its_own_is_not_cut(text: str) -> None:
    given: dict[str, Array] = {
        "k": KERNEL,
        "rows": np.zeros((40, 1), np.float32),
        "sides": np.array([0, 0, 1, 0, 0, 0, 1, 0], np.int64),
    }
    model = of_text(text, **{name: a for name, a in given.items() if name in text})
    [node] = [node for node in model.proto.graph.node if "y" in node.output]
    assert row_window(GraphView(model), node) is None
    with pytest.raises(ValueError, match="can't be cut"):
        banded(model, [[node.name]], 2)
    assert all(node.name not in g for r in find_bands(model, 2).values() for g in r.groups)


@pytest.mark.parametrize("shape", [(2, 40, 12), (1, 2, 40, 12, 3)])
def test_only_images_of_two_dimensions_are_cut(shape: tuple[int, ...]) -> None:
    sizes = ",".join(map(str, shape))
    model = as_it_is(model_of(f"(float[{sizes}] x) => (float[{sizes}] y) {{ y = Relu(x) }}"))
    assert not find_bands(model, 2)


def test_images_with_few_rows_are_not_cut() -> None:
    model = of_text("y = Conv(x, k)", k=KERNEL)
    assert find_bands(model, 2)
    assert not find_bands(model, 5)
    with pytest.raises(ValueError, match="39 bands"):
        banded(model, [[model.proto.graph.node[0].name]], 39)


@settings(deadline=None, max_examples=150)
@given(problem=cut_stacks(is_exact=True))
def test_regions_say_what_bands_cost(problem: tuple[Model, Groups, int]) -> None:
    model, groups, count = problem
    region = region_of(GraphView(model), groups, count)
    result = banded(model, groups, count)
    grouped = {name for group in groups for name in group}
    copies = {f"{name}/band{band}" for name in grouped for band in range(count)}
    assert region.operation_count == operations(model, grouped)
    assert region.operation_count + region.extra_operation_count == operations(result, copies)
    graph = graph_from_model(result)
    bands = [band_of(operator.name) for operator in graph.operators]
    crossing = {(e.tensor, bands[e.consumer]): e for e in graph.edges
                if None is not bands[e.producer] != bands[e.consumer] is not None}  # fmt: skip
    assert sum(edge.nbytes for edge in crossing.values()) <= region.exchanged_nbytes
    if count == 1:  # rows that no one reads are left out
        assert region.extra_operation_count <= 0 == region.joined_nbytes


def operations(model: Model, names: set[str]) -> int:
    """Products and sums of convolutions, taps of pools, and one for each element of others."""
    view, total = GraphView(model), 0
    for node in model.proto.graph.node:
        if node.name in names:
            each = 1
            if node.op_type == "Conv":
                each = 2 * int(np.prod(view.weights[node.input[1]].dims[1:]))
            elif node.op_type == "MaxPool":
                [kernel] = [a.ints for a in node.attribute if a.name == "kernel_shape"]
                each = int(np.prod(kernel))
            total += each * int(np.prod(model.tensors[node.output[0]].shape or ()))
    return total


def test_groups_are_as_long_as_little_is_done_twice() -> None:
    """Deep chains are cut into groups; one more piece would do too much twice."""
    lines = "  ".join(f"a{n + 1} = Conv<pads = [1,1,1,1]>(a{n}, k)" for n in range(12))
    text = f"(float[1,2,64,8] a0) => (float[1,2,64,8] a12) {{ {lines} }}"
    model = as_it_is(model_of(text, k=KERNEL))
    view, names = GraphView(model), [node.name for node in model.proto.graph.node]
    region = find_bands(model, 2)["bands"]
    assert [name for group in region.groups for name in group] == names
    assert len(region.groups) > 1
    for group, after in pairwise(region.groups):
        assert region_of(view, [group], 2).overhead <= 0.1
        assert region_of(view, [(*group, after[0])], 2).overhead > 0.1
    prefix = find_bands(model, 2)["bands-prefix"]
    assert prefix.groups == region.groups[:1]
    assert prefix.exchanged_nbytes == 0 < region.exchanged_nbytes
    whole = region_of(view, [names], 2)
    assert whole.overhead > region.overhead
    # Halos of 11, 10, ... 0 rows, on both sides of one border.
    assert whole.extra_operation_count * 12 * 64 == whole.operation_count * 2 * sum(range(12))


@pytest.mark.parametrize(
    "pool",
    [
        "AveragePool<kernel_shape = [2,2], strides = [1,2], count_include_pad = 1>",
        'MaxPool<kernel_shape = [1,1], strides = [2,2], auto_pad = "SAME_UPPER">',
        "MaxPool<kernel_shape = [3,1], strides = [2,2], pads = [1,0,1,0]>",
        'MaxPool<kernel_shape = [5,1], strides = [5,1], auto_pad = "VALID", ceil_mode = 1>',
    ],
)
def test_bands_of_odd_pools_compute_the_same_or_are_none(pool: str) -> None:
    model = as_it_is(
        model_of(f"(float[1,2,32,1] x) => (float[1,2,h,w] y) {{ a = Neg(x)  y = {pool}(a) }}")
    )
    view = GraphView(model)
    group = [node.name for node in model.proto.graph.node if row_window(view, node)]
    assert model.proto.graph.node[0].name in group
    feeds = feeds_for(model.proto, seed=0)
    try:
        expected = reference(model.proto, feeds)
    except Exception:  # ORT has no such pool
        return
    assert_close(reference(banded(model, [group], 2).proto, feeds), expected, 1e-5)
