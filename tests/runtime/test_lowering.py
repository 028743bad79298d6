"""A schedule survives the way to a lowered model and back, whatever ORT renames, adds or fuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn
from onnx import helper

from onnxsched.contraction import contract_chains
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.load import Session
from onnxsched_runtime.lowering import (
    gather_as_transposed,
    lower,
    origins,
    show_idle_transposes_as_views,
    to_lowered,
    to_portable,
)
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant
from support import fake_cuda, models
from support.plans import stream, topological_orders

Placements = dict[str, Placement]


def graph(*nodes: str) -> onnx.ModelProto:
    """A model of nodes `NAME: INPUT INPUT`, each of which writes the tensor of its name."""
    made = []
    for line in nodes:
        name, inputs = line.split(":")
        made.append(helper.make_node("Op", inputs.split(), [name.strip()], name=name.strip()))
    return onnx.ModelProto(graph=onnx.GraphProto(node=made))


def placed(**streams: int) -> Placements:
    return {name: stream(number) for name, number in streams.items()}


def assert_runnable(placements: Mapping[str, Placement], model: onnx.ModelProto) -> None:
    """Check that every node is placed once, after all that it reads from."""
    names = [node.name for node in model.graph.node]
    assert sorted(placements) == sorted(names)
    written: set[str] = set()
    nodes = {node.name: node for node in model.graph.node}
    inside = {tensor for node in model.graph.node for tensor in node.output}
    for name in placements:
        assert set(nodes[name].input) & inside <= written
        written.update(nodes[name].output)


PORTABLE = graph("a: x", "b: a", "c: a", "d: b c")
SCHEDULE = placed(a=1, c=2, b=3, d=1)


def test_origins_are_found_by_name() -> None:
    lowered = graph("t: x", "a_token_7: t", "b: a_token_7", "c_token_12_1: b", "other_token_3: b")
    assert origins(PORTABLE, lowered) == {"a_token_7": "a", "b": "b", "c_token_12_1": "c"}


def test_a_name_that_looks_renamed_is_its_own_origin() -> None:
    portable = graph("a: x", "a_token_7: a")
    lowered = graph("a: x", "a_token_7: a", "a_token_7_token_9: a")
    assert origins(portable, lowered) == {
        "a": "a",
        "a_token_7": "a_token_7",
        "a_token_7_token_9": "a_token_7",
    }


def test_renamed_nodes_keep_stream_and_order_and_transposes_go_beside_them() -> None:
    lowered = graph(
        "in: x",
        "a_token_1: in",
        "b_token_2: a_token_1",
        "c: a_token_1",
        "d: b_token_2 c",
        "e: d",
    )
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried.items()) == [
        ("in", stream(1)),
        ("a_token_1", stream(1)),
        ("c", stream(2)),
        ("b_token_2", stream(3)),
        ("d", stream(1)),
        ("e", stream(1)),
    ]
    assert list(to_portable(carried, PORTABLE, lowered).items()) == list(SCHEDULE.items())


def test_what_is_added_between_goes_where_the_chain_goes_that_it_is_in() -> None:
    lowered = graph("a: x", "b: a", "c: a", "added: b c", "more: added", "d: more")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried.items()) == [
        ("a", stream(1)),
        ("c", stream(2)),
        ("b", stream(3)),
        ("added", stream(1)),
        ("more", stream(1)),
        ("d", stream(1)),
    ]


def test_what_is_added_at_a_fork_or_a_join_goes_after_the_last_that_it_reads_from() -> None:
    lowered = graph("a: x", "b: a", "c: a", "fork: b", "join: fork c", "d: join a", "e: fork d")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert carried["fork"] == stream(3)
    assert carried["join"] == stream(3)
    assert carried["e"] == stream(1)


def test_a_node_that_was_fused_away_goes_beside_what_it_reads_from() -> None:
    lowered = graph("a: x", "c: a", "d: a c")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried.items()) == [("a", stream(1)), ("c", stream(2)), ("d", stream(1))]
    assert list(to_portable(carried, PORTABLE, lowered).items()) == [
        ("a", stream(1)),
        ("b", stream(1)),
        ("c", stream(2)),
        ("d", stream(1)),
    ]


def test_the_order_is_repaired_where_a_fusion_has_moved_an_edge() -> None:
    lowered = graph("a: x", "b: a", "c: a b", "d: c")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried) == ["a", "b", "c", "d"]
    assert carried == SCHEDULE


def test_of_two_nodes_with_one_origin_the_one_launched_first_counts() -> None:
    lowered = graph("a: x", "b_token_1: a", "b_token_2: b_token_1", "c: a", "d: b_token_2 c")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried) == ["a", "c", "b_token_1", "b_token_2", "d"]
    assert {carried["b_token_1"], carried["b_token_2"]} == {stream(3)}
    moved = {name: stream(5) if name == "b_token_2" else p for name, p in carried.items()}
    assert to_portable(moved, PORTABLE, lowered) == SCHEDULE


def test_what_reads_inputs_only_goes_before_the_first_that_reads_from_it() -> None:
    lowered = graph("t: x", "u: t", "a: x", "b: a u", "c: a u", "d: b c")
    carried = to_lowered(SCHEDULE, PORTABLE, lowered)
    assert list(carried.items()) == [
        ("a", stream(1)),
        ("t", stream(2)),
        ("u", stream(2)),
        ("c", stream(2)),
        ("b", stream(3)),
        ("d", stream(1)),
    ]


def test_what_stands_apart_is_launched_first() -> None:
    lowered = graph("alone: x", "a: x", "b: a", "c: a", "d: b c")
    assert next(iter(to_lowered(SCHEDULE, PORTABLE, lowered))) == "alone"


def test_where_no_name_is_left_the_way_out_is_told() -> None:
    lowered = graph("p: x", "q: p")
    with pytest.raises(ModelError, match="renames every operator") as caught:
        to_lowered(SCHEDULE, PORTABLE, lowered)
    assert str(caught.value).endswith("run `onnxsched optimize --no-variants`.")
    assert caught.value.exit_code == 5
    with pytest.raises(ModelError, match="renames every operator"):
        to_portable(placed(p=1, q=1), PORTABLE, lowered)


@dataclass(frozen=True)
class Lowering:
    """A portable model, its schedule, and what some ORT might make of it."""

    portable: onnx.ModelProto
    schedule: Placements
    lowered: onnx.ModelProto
    survivors: Mapping[str, str]
    """Portable name to lowered name."""


@st.composite
def lowerings(draw: DrawFn, *, moves_edges: bool) -> Lowering:
    """Random graphs in which nodes are renamed, fused away and inserted anywhere."""
    count = draw(st.integers(1, 8))
    needs = [
        draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        for i in range(count)
    ]
    portable = graph(*(f"n{i}: x " + " ".join(f"n{j}" for j in needs[i]) for i in range(count)))
    order = draw(topological_orders(needs))
    schedule = {f"n{i}": stream(draw(st.integers(0, 3))) for i in order}
    kept = draw(st.sets(st.integers(0, count - 1), min_size=1))
    tensor = {"x": "x"}
    nodes: list[onnx.NodeProto] = []
    survivors: dict[str, str] = {}

    def added(reads: str) -> str:
        """The tensor, perhaps behind a transpose or two."""
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            name = f"Transpose_{len(nodes)}"
            nodes.append(helper.make_node("Transpose", [reads], [name], name=name))
            reads = name
        return reads

    for i, node in enumerate(portable.graph.node):
        reads = [added(tensor[t]) for t in node.input]
        if i not in kept:
            tensor[node.name] = reads[-1]
            continue
        if moves_edges and nodes and draw(st.booleans()):
            reads.append(draw(st.sampled_from(nodes)).output[0])
        suffix = draw(st.sampled_from(["", f"_token_{i}", f"_token_{i}_1"]))
        survivors[node.name] = f"{node.name}{suffix}"
        tensor[node.name] = f"{node.name}'"
        nodes.append(helper.make_node("Op", reads, [tensor[node.name]], name=survivors[node.name]))
        added(tensor[node.name])
    lowered = onnx.ModelProto(graph=onnx.GraphProto(node=nodes))
    return Lowering(portable, schedule, lowered, survivors)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), moves_edges=st.booleans())
def test_there_and_back_every_node_is_placed_and_survivors_stay(
    data: DataObject, moves_edges: bool
) -> None:
    case = data.draw(lowerings(moves_edges=moves_edges))
    there = to_lowered(case.schedule, case.portable, case.lowered)
    assert_runnable(there, case.lowered)
    assert {old: there[new] for old, new in case.survivors.items()} == {
        old: case.schedule[old] for old in case.survivors
    }
    back = to_portable(there, case.portable, case.lowered)
    assert_runnable(back, case.portable)
    assert {old: back[old] for old in case.survivors} == {
        old: case.schedule[old] for old in case.survivors
    }
    assert set(there.values()) | set(back.values()) <= set(case.schedule.values())


@settings(deadline=None, max_examples=200)
@given(case=lowerings(moves_edges=False))
def test_the_launch_order_of_survivors_stays_where_no_edge_has_moved(case: Lowering) -> None:
    launched = [name for name in case.schedule if name in case.survivors]
    there = to_lowered(case.schedule, case.portable, case.lowered)
    origin = origins(case.portable, case.lowered)
    assert [origin[name] for name in there if name in origin] == launched
    back = to_portable(there, case.portable, case.lowered)
    assert [name for name in back if name in case.survivors] == launched


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_schedule_of_chains_is_the_same_there_and_back(data: DataObject) -> None:
    case = data.draw(lowerings(moves_edges=False))
    graph = operators_of(case.lowered)
    origin = origins(case.portable, case.lowered)
    names = [node.name for node in case.lowered.graph.node]
    chains = contract_chains(graph).groups
    order = data.draw(topological_orders([graph.predecessors[i] for i in range(len(graph))]))
    placement = {i: stream(data.draw(st.integers(0, 3))) for i in range(len(chains))}
    there = {names[i]: placement[n] for i in order for n, c in enumerate(chains) if i in c}
    back = to_lowered(to_portable(there, case.portable, case.lowered), case.portable, case.lowered)
    named = [c for c in chains if any(names[i] in origin for i in c)]
    kept = {names[i] for chain in named for i in chain}
    assert {n: back[n] for n in kept} == {n: there[n] for n in kept}


def operators_of(model: onnx.ModelProto) -> OperatorGraph:
    nodes = model.graph.node
    writer = {tensor: i for i, node in enumerate(nodes) for tensor in node.output}
    edges = {
        Edge(writer[t], i, t, 4) for i, node in enumerate(nodes) for t in node.input if t in writer
    }
    return OperatorGraph(
        tuple(Operator(node.name, node.op_type) for node in nodes), tuple(sorted(edges, key=str))
    )


@pytest.mark.parametrize("name", ["diamond", "two_towers", "fork_join"])
def test_types_that_ort_leaves_alone_are_kept(name: str) -> None:
    model = models.MODELS[name]()
    source = ModelSource(model, models.tensor_types(model), DEFAULT_VARIANT)
    lowered = lower(source, models.CPU)
    flowing = {t for node in lowered.model.graph.node for t in node.output if t}
    flowing.update(value.name for value in lowered.model.graph.input)
    assert lowered.tensors.keys() == flowing
    for tensor in flowing & source.tensors.keys():
        assert lowered.tensors[tensor] == source.tensors[tensor]


def lowered_on_the_cpu(model: onnx.ModelProto) -> ModelSource:
    """What ORT's CPU provider makes of it, which has a blocked layout of its own."""
    source = ModelSource(model, models.tensor_types(model), Variant("nhwc"))
    return lower(source, models.CPU)


def test_ort_lowers_a_whole_model_and_types_what_is_between() -> None:
    model = models.fork_join()
    lowered = lowered_on_the_cpu(model)
    assert any(node.domain == "com.microsoft.nchwc" for node in lowered.model.graph.node)
    assert lowered.variant == Variant("nhwc")
    names = [node.name for node in lowered.model.graph.node]
    assert len(set(names)) == len(names)
    for node in lowered.model.graph.node:
        assert all(lowered.tensors[tensor].is_static for tensor in node.output if tensor)


def test_operators_that_compute_the_same_stay_apart_and_where_they_are() -> None:
    model = models.model_of(
        """(float[1,3,6,6] x) => (float[1,2,6,6] y) {
            a = Relu(x)  b = Relu(x)  c = Conv(a, w)  d = Conv(b, w)  y = Add(c, d)
        }""",
        w=models.weight(2, 3, 1, 1),
    )
    lowered = lowered_on_the_cpu(model).model
    assert [node.op_type for node in lowered.graph.node].count("Relu") == 2
    names = [node.name for node in model.graph.node]
    placements = {name: stream(number) for number, name in enumerate(names)}
    carried = to_lowered(placements, model, lowered)
    assert {carried[name] for name in names[:2]} == {stream(0), stream(1)}


def test_zeros_that_a_pool_counts_stay() -> None:
    model = models.model_of(
        """(float[1,2,5,5] x) => (float[1,2,4,5] y) {
            a = Pad(x, sides)  y = MaxPool<kernel_shape = [3,1]>(a)
        }""",
        sides=np.array([0, 0, 0, 0, 0, 0, 1, 0]),
    )
    lowered = lowered_on_the_cpu(model).model
    assert [node.op_type for node in lowered.graph.node] == ["Pad", "MaxPool"]


def test_a_lowered_model_runs_by_the_schedule_of_the_portable_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda.install(monkeypatch)
    model = models.fork_join()
    lowered = lowered_on_the_cpu(model)
    annotation = models.annotation_of(model, device=Device("cuda"))
    annotation = replace(annotation, variant=lowered.variant)
    with Session(model, annotation, lowered=lowered) as session:
        on = {name: s.placement for s in session.plan.segments for name in s.nodes}
        assert sorted(on) == sorted(node.name for node in lowered.model.graph.node)
        origin = origins(model, lowered.model)
        assert origin
        for name, old in origin.items():
            assert on[name] == annotation.placements[old]
        assert len(set(on.values())) > 1
        for seed in range(2):
            feeds = models.feeds_for(model, seed)
            models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_an_output_that_lowering_folds_to_a_constant_is_still_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda.install(monkeypatch)
    model = models.model_of(
        "(float[3] x) => (float[3] y, float[3] w) { w = Identity(k)  y = Add(x, w) }",
        k=models.weight(3),
    )
    lowered = lowered_on_the_cpu(model)
    annotation = models.annotation_of(model, device=Device("cuda"))
    annotation = replace(annotation, variant=lowered.variant)
    feeds = models.feeds_for(model)
    with Session(model, annotation, lowered=lowered) as session:
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


@settings(deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_transpose_is_shown_as_a_view_where_it_moves_no_number(
    shape: list[int], data: DataObject
) -> None:
    perm = data.draw(st.permutations(range(len(shape))))
    given_perm: dict[str, Any] = {} if data.draw(st.booleans()) else {"perm": perm}
    perm = given_perm.get("perm", list(reversed(range(len(shape)))))
    after = [shape[axis] for axis in perm]
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Transpose", ["x"], ["y"], "moves", **given_perm)],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, after)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    tensors = {
        name: TensorType(onnx.TensorProto.FLOAT, tuple(of))
        for name, of in (("x", shape), ("y", after))
    }
    show_idle_transposes_as_views(model, tensors)
    (node,) = model.graph.node
    is_idle = bool((value.transpose(perm).ravel() == value.ravel()).all())
    assert (node.op_type, node.name) == ("Reshape" if is_idle else "Transpose", "moves")
    (result,) = models.reference(model, {"x": value})
    np.testing.assert_array_equal(result, value.transpose(perm))


@pytest.mark.parametrize(("is_vector", "is_read_twice"), [(1, 0), (1, 1), (0, 0)])
def test_a_gather_out_of_a_vector_writes_what_a_transpose_would(
    is_vector: bool, is_read_twice: bool
) -> None:
    order = [0, 2, 3, 1] if is_vector else [1, 0]
    places = np.array([5, 0, 1, 2, 3, 4, 0, 0, 3, 1, 2, 5]).reshape(2, 3, 2, 1)
    stored = {
        "shape": np.array([-1] if is_vector else [2, 3]),
        "places": places if is_vector else np.array([1, 0]),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"], "flat"),
        helper.make_node("Gather", ["flat", "places"], ["read"], "gather", axis=0),
        helper.make_node("Transpose", ["read"], ["y"], "moves", perm=order),
        helper.make_node("Neg", ["read" if is_read_twice else "y"], ["z"], "neg"),
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", float32, [1, 6])],
        [helper.make_tensor_value_info(name, float32, None) for name in "yz"],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = {"x": np.arange(6, dtype=np.float32).reshape(1, 6)}
    expected = models.reference(model, feeds)
    gather_as_transposed(model)
    is_gone = "moves" not in {node.name for node in model.graph.node}
    assert is_gone == (is_vector and not is_read_twice)
    models.assert_same(models.reference(model, feeds), expected)
