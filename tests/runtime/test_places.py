"""What lies in the arena is what it should be, in every order that a graph's edges allow.

Inside a session a view has the place of what it views, as in ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from onnx import numpy_helper

from onnxsched_runtime.arena import Arena, check_arena, plan_arena
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import PlanError
from onnxsched_runtime.fusing import fused
from onnxsched_runtime.lanes import (
    Lane,
    LanePlan,
    lane_tensors,
    lanes_of,
    touched_places,
    written_instead,
)
from onnxsched_runtime.model import node_reads
from onnxsched_runtime.moves import Cut, Joined, Move, check_places, places_inside
from onnxsched_runtime.moving import moved, moved_nodes
from onnxsched_runtime.outliving import outliving
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.pooling import pooled
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.views import is_view
from onnxsched_runtime.wiring import ChainNode, wire
from support.fused import Lowered, computed, evaluated, feeds_for
from support.models import Array

GPU = Device("cuda")


@st.composite
def viewing_models(draw: DrawFn) -> ModelSource:
    """Models of convolutions and views of what they write, most of them fused."""
    net = Lowered((1, draw(st.integers(1, 2)), 2, 2), draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(5, 12))):
        images = [name for name, shape in net.shapes.items() if len(shape) == 4]
        image = draw(st.sampled_from(images[-3:]))
        kind = draw(st.sampled_from(["conv", "conv", "conv", "view", "view", "relu"]))
        if kind == "conv":
            net.conv(image, 2)
        elif kind == "view":
            net.reshape(image, -1, 2)
        else:
            net.add("Relu", [image])
    rows = [name for name, shape in net.shapes.items() if len(shape) == 2]
    if rows:  # what views show is read last
        net.add("Concat", [rows[0], rows[-1]], axis=0)
    written = list(net.shapes)[1:]
    source = net.source(written[-1])
    return fused(source) if draw(st.integers(0, 4)) else source


@st.composite
def moving_models(draw: DrawFn) -> ModelSource:
    """Models of convolutions, pools, views and rows that are cut out and joined."""
    shape = (1, 2 * draw(st.integers(1, 4)), 2, draw(st.sampled_from([2, 4])))
    net = Lowered(shape, draw(st.integers(0, 2**31)))
    kinds = ("conv", "conv", "relu", "pool", "add", "cut", "cut", "split", "join", "join", "view")
    for _ in range(draw(st.integers(4, 14))):
        images = [name for name, shape in net.shapes.items() if len(shape) == 4]
        image = draw(st.sampled_from(images[-4:]))
        grow(net, draw(st.sampled_from(kinds)), image, images, draw)
    written = list(net.shapes)[1:] or [net.add("Relu", ["x"])]
    outputs = [written[-1], *draw(st.lists(st.sampled_from(written), max_size=2))]
    return moved(pooled(fused(net.source(*dict.fromkeys(outputs)))))


def grow(net: Lowered, kind: str, image: str, images: Sequence[str], draw: DrawFn) -> None:
    """Let an operator of a kind read an image, if there is one that can."""
    _, height, width, channels = net.shapes[image]
    if kind == "conv":
        net.conv(image, draw(st.sampled_from([2, 4])))
    elif kind == "relu":
        net.add("Relu", [image])
    elif kind == "pool":
        net.pool(image)
    elif kind == "add":
        alike = [name for name in images if net.shapes[name] == net.shapes[image]]
        net.add("Add", [image, draw(st.sampled_from(alike))])
    elif kind == "cut" and height > 1:
        start = draw(st.integers(0, height - 1))
        net.cut(image, 1, start, draw(st.integers(start + 1, height)))
    elif kind == "split" and height > 1:
        count = draw(st.integers(1, height - 1))
        net.split(image, 1, count, height - count)
    elif kind == "join":
        alike = [name for name in images if net.shapes[name][2:] == (width, channels)]
        parts = [image, *draw(st.lists(st.sampled_from(alike), min_size=1, max_size=2))]
        if sum(net.shapes[part][1] for part in parts) <= 16:
            net.add("Concat", parts, axis=1)
    elif kind == "view" and height % 2 == 0:
        net.reshape(image, 1, height // 2, 2 * width, channels)


def planned(source: ModelSource, streams: Callable[[str], int]) -> ExecutionPlan:
    placements = {n.name: Placement(GPU, streams(n.name)) for n in source.model.graph.node}
    return plan_model(source.model, placements, {})


def lanes_in(source: ModelSource, plan: ExecutionPlan, are_plain: bool) -> LanePlan:
    """The lanes, which write all that they can to places of their own if told to."""
    found = lanes_of(plan, plan.pieces[0])
    if not are_plain:
        return found
    lanes = [
        lane if plan.segments[lane.segments[0]].is_fused else outliving(source, plan, lane)
        for lane in found.lanes
    ]
    return replace(found, lanes=tuple(lanes))


def sessions_of(plan: ExecutionPlan, found: LanePlan) -> list[Lane]:
    return [lane for lane in found.lanes if not plan.segments[lane.segments[0]].is_fused]


def sizes_of(source: ModelSource, plan: ExecutionPlan, found: LanePlan) -> dict[str, int]:
    return {name: source.tensors[name].nbytes for name in lane_tensors(plan, found.lanes)}


@settings(deadline=None, max_examples=300)
@given(
    source=viewing_models() | moving_models(),
    count=st.integers(1, 3),
    are_plain=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_place_is_written_while_it_is_needed(
    source: ModelSource, count: int, are_plain: bool, seed: int
) -> None:
    rng = Random(seed)
    plan = planned(source, lambda name: rng.randrange(count))
    found = lanes_in(source, plan, are_plain)
    sizes = sizes_of(source, plan, found)
    moves = moved_nodes(source)
    inside = {n: p for n, p in places_inside(plan, moves, source.ends).items() if n in sizes}
    check_places(inside, sizes)
    nbytes = {name: size for name, size in sizes.items() if name not in inside}
    touched = touched_places(source, plan, sessions_of(plan, found))
    arena = plan_arena(plan, nbytes, touched, inside)
    check_arena(plan, nbytes, arena, touched, inside)
    parts = {
        name: arena.offsets[place.root] + place.start_nbytes for name, place in inside.items()
    }
    arena = replace(arena, offsets={**arena.offsets, **parts})
    feeds = {name: array.astype(np.float32) for name, array in feeds_for(source, seed).items()}
    expected = evaluated(source, feeds)
    idle = in_place(plan, moves, arena)
    for _ in range(3):
        actual = played(source, plan, found, arena, feeds, rng, idle)
        for name, array in actual.items():
            np.testing.assert_array_equal(array, expected[name].astype(np.float32))


def in_place(plan: ExecutionPlan, moves: Mapping[str, Move], arena: Arena) -> frozenset[str]:
    """The nodes that move nothing, as what they write lies there already."""
    idle = set()
    for segment in plan.segments:
        move = moves.get(segment.nodes[0])
        if isinstance(move, Cut):
            source, target = (arena.offsets[t] for t in (segment.inputs[0], segment.outputs[0]))
            if source + move.start_nbytes != target:
                continue
        if isinstance(move, Cut | Joined):
            idle.add(segment.nodes[0])
    return frozenset(idle)


def played(
    source: ModelSource,
    plan: ExecutionPlan,
    found: LanePlan,
    arena: Arena,
    feeds: Mapping[str, Array],
    rng: Random,
    idle: frozenset[str] = frozenset(),
) -> dict[str, Array]:
    """Run the wired graph in a random order that its edges allow; returns the outputs."""
    memory = np.full(arena.nbytes, 255, np.uint8)

    def at(tensor: str, like: str) -> Array:
        kind, start = source.tensors[like], arena.offsets[tensor]
        return memory[start : start + kind.nbytes].view(np.float32).reshape(kind.shape or ())

    weights = {w.name: numpy_helper.to_array(w) for w in source.model.graph.initializer}
    chains: list[list[ChainNode]] = []
    actions: list[list[Callable[[], None]]] = []
    for lane in found.lanes:
        nodes, does = chain_of(source, plan, lane, weights, at, idle)
        chains.append(nodes)
        actions.append(does)
    wired = wire(chains, found.positions, found.waits)
    for name in feeds.keys() & arena.offsets.keys():
        at(name, name)[...] = feeds[name]
    waiting = list(range(len(wired)))
    while waiting:
        ready = [i for i in waiting if not set(wired[i].predecessors) & set(waiting)]
        chosen = rng.choice([ready[0], ready[-1], rng.choice(ready)])
        actions[wired[chosen].chain][wired[chosen].index]()
        waiting.remove(chosen)
    return {v.name: at(v.name, v.name).copy() for v in source.model.graph.output}


def chain_of(
    source: ModelSource,
    plan: ExecutionPlan,
    lane: Lane,
    weights: Mapping[str, Array],
    at: Callable[[str, str], Array],
    idle: frozenset[str],
) -> tuple[list[ChainNode], list[Callable[[], None]]]:
    """What a lane launches: its nodes but for views, which alias, and its marks."""
    instead = written_instead(source, plan, lane)
    place = {tensor: tensor for tensor in (*lane.inputs, *lane.outputs)}
    place |= {origin: tensor for tensor, origin in instead.items()}
    origin_of: dict[str, str] = {}
    inside: dict[str, Array] = {}
    nodes: list[ChainNode] = []
    does: list[Callable[[], None]] = []

    def value(tensor: str) -> Array:
        origin = tensor
        while origin in origin_of:
            origin = origin_of[origin]
        if tensor in weights:
            return weights[tensor]
        stored = at(place[origin], origin) if origin in place else inside[origin]
        return stored.reshape(source.tensors[tensor].shape or ()).copy()

    def run(name: str) -> None:
        if name in idle:
            return
        node = source.nodes[name]
        for written, result in computed(node, {t: value(t) for t in node_reads(node)}).items():
            if written in place:
                at(place[written], written)[...] = result
            else:
                inside[written] = result.astype(np.float32)

    for number, index in enumerate(lane.segments):
        for name in plan.segments[index].nodes:
            node = source.nodes[name]
            has_place = node.output[0] in lane.outputs and node.output[0] not in instead
            if is_view(node) and not has_place:
                origin_of[node.output[0]] = node.input[0]
                continue
            nodes.append(ChainNode((len(nodes) - 1,) if nodes else ()))
            does.append(lambda name=name: run(name))  # type: ignore[misc]
        if number < len(lane.segments) - 1:
            nodes.append(ChainNode((len(nodes) - 1,) if nodes else (), number + 1, False))
            does.append(lambda: None)
    return nodes, does


def late_view() -> tuple[ModelSource, str]:
    """A view that is written as what it views, before another tensor is done with."""
    net = Lowered((1, 4, 4, 2))
    early, rectified = net.conv("x", 2), net.add("Relu", ["x"])
    last, view = net.conv(early, 2), net.reshape(rectified, 1, 2, 8, 2)
    return fused(net.source(last, net.conv(view, 2))), view


def read_late(net: Lowered, view: str, deep: str) -> ModelSource:
    """A net whose view is read once three convolutions on `deep` are done."""
    for _ in range(3):
        deep = net.conv(deep, 4)
    return fused(net.source(net.add("Concat", [view, net.reshape(deep, 1, -1, 2)], axis=1)))


def long_view() -> tuple[ModelSource, str]:
    """A view of what a convolution writes, read after other convolutions, as in detectors."""
    net = Lowered((1, 4, 4, 4))
    head = net.conv("x", 4)
    return read_late(net, net.reshape(head, 1, -1, 2), "x"), head


def own_view() -> tuple[ModelSource, str]:
    """A view of what the session itself writes, which a convolution reads long before it."""
    net = Lowered((1, 4, 4, 4))
    rectified = net.add("Relu", ["x"])
    return read_late(net, net.reshape(rectified, 1, -1, 2), rectified), rectified


def view_of_a_copy() -> tuple[ModelSource, str]:
    """A view of a second view, which has to be copied since the first has the place."""
    net = Lowered((1, 4, 4, 4))
    rectified = net.add("Relu", ["x"])
    first, second = net.reshape(rectified, 1, 2, 8, 4), net.reshape(rectified, 1, 8, 2, 4)
    other, view = net.conv(first, 4), net.reshape(second, 1, -1, 2)
    deep = net.conv(net.conv(net.conv(second, 4), 4), 4)
    parts = [view, net.reshape(deep, 1, -1, 2), net.reshape(other, 1, -1, 2)]
    return fused(net.source(net.add("Concat", parts, axis=1))), second


@pytest.mark.parametrize("build", [late_view, long_view, own_view, view_of_a_copy])
def test_a_place_is_in_use_while_it_is_under_another_name(
    build: Callable[[], tuple[ModelSource, str]],
) -> None:
    source, tensor = build()
    plan = planned(source, lambda name: 1)
    found = lanes_in(source, plan, are_plain=False)
    (session,) = sessions_of(plan, found)
    touched = touched_places(source, plan, [session])
    assert touched[tensor] == frozenset(session.segments)
    nbytes = sizes_of(source, plan, found)
    check_arena(plan, nbytes, plan_arena(plan, nbytes, touched), touched)
    with pytest.raises(PlanError, match="share memory"):
        check_arena(plan, nbytes, plan_arena(plan, nbytes), touched)
