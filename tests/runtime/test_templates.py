"""Segments that differ only in large weights are one template, and one session runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import ModelPart, ModelSource, node_reads
from onnxsched_runtime.plan import Segment
from onnxsched_runtime.planning import plan_model
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.templates import Template, template_of
from support import fake_cuda, models
from support.plans import stream

ON_CPU = SessionSettings(models.CPU)


def source_of(model: onnx.ModelProto) -> ModelSource:
    return ModelSource(model, models.tensor_types(model))


def segment(model: onnx.ModelProto, reads: str, writes: str) -> Segment:
    """All nodes of a model as one segment."""
    names = tuple(node.name for node in model.graph.node)
    return Segment(names, stream(0), tuple(reads.split()), tuple(writes.split()))


def content(body: str, *, shape: str = "2,32", scale: float = 1.0, bias: float = 0.0) -> bytes:
    """The template of `float y = BODY`, which may read `w`, `v` (large) and `b` (small)."""
    weights = {
        name: weight
        for name, weight in (
            ("w", models.weight(32, 32) * np.float32(scale)),
            ("v", models.weight(32, 32) * np.float32(scale + 1)),
            ("b", models.weight(32) + np.float32(bias)),
        )
        if f"{name}," in body or f"{name})" in body
    }
    model = models.model_of(
        f"(float[{shape}] x, float[{shape}] z) => (float[{shape}] y) {{ {body} }}", **weights
    )
    template = template_of(source_of(model), segment(model, "x z", "y"))
    assert template is not None
    return template.part.content


LAYER = "h = MatMul(x, w)  i = Add(h, b)  j = LeakyRelu<alpha = 0.1>(i)  y = Sub(j, z)"


def test_other_names_and_large_weights_make_no_difference() -> None:
    assert content(LAYER) == content(LAYER, scale=3.0)
    assert content(LAYER) == content(LAYER.replace("w", "v"))
    other = "p = MatMul(x, w)  q = Add(p, b)  r = LeakyRelu<alpha = 0.1>(q)  y = Sub(r, z)"
    assert content(LAYER) == content(other)


@pytest.mark.parametrize(
    "other",
    [
        content(LAYER, bias=1.0),
        content(LAYER, shape="3,32"),
        content(LAYER.replace("0.1", "0.2")),
        content(LAYER.replace("LeakyRelu<alpha = 0.1>", "Relu")),
        content(LAYER.replace("Sub(j, z)", "Sub(z, j)")),
        content(LAYER.replace("Sub(j, z)", "Sub(j, x)")),
        content(LAYER.replace("Sub(j, z)", "Sub(h, z)")),
        content(LAYER.replace("Add(h, b)", "Add(b, h)")),
    ],
    ids=[
        "small weight", "shape", "attribute", "operator", "operands", "input", "edge", "order",
    ],
)  # fmt: skip
def test_all_else_makes_one(other: bytes) -> None:
    assert content(LAYER) != other


def test_a_weight_used_twice_is_not_two_weights() -> None:
    twice = content("h = MatMul(x, w)  i = MatMul(h, w)  y = Sub(i, z)")
    assert twice == content("h = MatMul(x, v)  i = MatMul(h, v)  y = Sub(i, z)")
    assert twice != content("h = MatMul(x, w)  i = MatMul(h, v)  y = Sub(i, z)")


def test_what_is_handed_on_counts() -> None:
    model = models.model_of("(float[3] x) => (float[3] y) { a = Neg(x)  y = Relu(a) }")
    templates = [
        template_of(source_of(model), segment(model, "x", writes)) for writes in ("y", "a y")
    ]
    first, second = (t.part.content for t in templates if t is not None)
    assert first != second


def test_the_element_type_of_a_large_weight_counts() -> None:
    def of(dtype: type) -> bytes:
        model = models.model_of(
            "(int64[2] x) => (float[2,300] y) { a = Gather(w, x)  y = Cast<to = 1>(a) }",
            w=models.weight(3, 300).astype(dtype),
        )
        template = template_of(source_of(model), segment(model, "x", "y"))
        assert template is not None
        return template.part.content

    assert of(np.float32) == of(np.float32) != of(np.float64)


@pytest.mark.parametrize("name", ["fork_join", "branch", "loop"])
def test_convolutions_and_bodies_are_not_shared(name: str) -> None:
    source = source_of(models.MODELS[name]())
    seen = set()
    for node in source.model.graph.node:
        reads = tuple(t for t in node_reads(node) if not source.is_weight(t))
        one = Segment((node.name,), stream(0), reads, tuple(node.output))
        is_alone = node.op_type in ("Conv", "If", "Loop")
        assert (template_of(source, one) is None) == is_alone
        seen.add(is_alone)
    assert seen == {False, True}


def outputs_of(
    template: Template, source: ModelSource, feeds: dict[str, models.Array]
) -> dict[str, models.Array]:
    """What a session of a template computes, by the names of the model."""
    fed = {short: feeds[name] for short, name in template.inputs.items()}
    for short, name in template.weights.items():
        array = source.large_weight(name)
        assert array is not None
        fed[short] = array
    with OrtSession(template.part, ON_CPU) as session:
        results = session.run(fed, list(template.outputs))
    return dict(zip(template.outputs.values(), results, strict=True))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 99))
def test_templates_one_after_another_compute_the_model(data: DataObject, seed: int) -> None:
    shareable = ["chain", "diamond", "two_towers", "large_weight", "split", "optional_input"]
    build = data.draw(st.sampled_from([models.MODELS[name] for name in shareable]) | st.none())
    model = build() if build else data.draw(models.random_models())
    streams = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    annotation = models.annotation_of(model, streams, device=Device("cuda"))
    source = source_of(model)
    plan = plan_model(model, annotation.placements, {})
    feeds = models.feeds_for(model, seed)
    values = dict(feeds)
    for index in (index for piece in plan.pieces for index in piece.runs):
        template = template_of(source, plan.segments[index])
        assert template is not None
        values |= outputs_of(template, source, values)
    models.assert_same(
        [values[value.name] for value in model.graph.output], models.reference(model, feeds)
    )


def layers(count: int) -> onnx.ModelProto:
    """Equal layers in a row, each of which is also read on the side."""
    lines, weights = [], {}
    generator = np.random.default_rng(3)
    for n in range(count):
        lines.append(
            f"h{n} = MatMul({f'a{n - 1}' if n else 'x'}, w{n})  i{n} = Add(h{n}, b)"
            f"  j{n} = Mul(i{n}, c)  k{n} = MatMul(j{n}, v{n})  a{n} = Tanh(k{n})"
            f"  s{n} = Neg(a{n})"
        )
        for name in (f"w{n}", f"v{n}"):
            weights[name] = generator.standard_normal((32, 32), dtype=np.float32) / np.float32(9)
    sides = ", ".join(f"s{n}" for n in range(count))
    return models.model_of(
        f"(float[2,32] x) => (float[2,32] y) {{ {' '.join(lines)} y = Sum({sides}) }}",
        b=models.weight(32),
        c=models.weight(32) + np.float32(1),
        **weights,
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[ModelPart | Path]:
    """What sessions were made of, one entry each."""
    fake_cuda.install(monkeypatch)
    made: list[ModelPart | Path] = []
    create = OrtSession.__init__

    def counted(
        self: OrtSession, source: ModelPart | Path, with_settings: SessionSettings
    ) -> None:
        made.append(source)
        create(self, source, with_settings)

    monkeypatch.setattr(OrtSession, "__init__", counted)
    return made


def on_streams(model: onnx.ModelProto, layer_streams: Sequence[int]) -> Annotation:
    """Layers on the given streams, in turn; what is on the side, and the sum, on stream 9."""
    annotation = models.annotation_of(model, device=Device("cuda"))
    placements = {
        node.name: Placement(
            Device("cuda"),
            9 if node.op_type in ("Neg", "Sum") else layer_streams[n // 6 % len(layer_streams)],
        )
        for n, node in enumerate(model.graph.node)
    }
    return replace(annotation, placements=placements)


@pytest.mark.parametrize(
    ("layer_streams", "session_count"), [((0,), 3), ((0, 1, 0), 4), ((0, 1, 2), 5)]
)
def test_equal_layers_of_one_stream_share_a_session(
    opened: list[ModelPart | Path], layer_streams: Sequence[int], session_count: int
) -> None:
    model = layers(3)
    with Session(model, on_streams(model, layer_streams)) as session:
        assert session.capture == "whole"
        assert len(session.plan.segments) == 6
        # a session for each stream of layers, one for two sides, and one for the last and the sum
        assert len(opened) == session_count
        for seed in range(3):
            feeds = models.feeds_for(model, seed)
            models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_sessions_that_ort_captures_are_not_shared(opened: list[ModelPart | Path]) -> None:
    model = layers(3)
    with Session(model, on_streams(model, [0]), capture="ort") as session:
        assert len(opened) == len(session.plan.segments)
        feeds = models.feeds_for(model)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))


def test_what_stays_on_the_host_is_not_shared(opened: list[ModelPart | Path]) -> None:
    model = layers(3)
    annotation = on_streams(model, [0])
    reasons = {node.name: "planted" for node in model.graph.node if node.op_type == "Tanh"}
    with Session(model, replace(annotation, host_reasons=reasons)) as session:
        hosts = [s for s in session.plan.segments if s.host_reason]
        assert len(hosts) == 3
        unshared = [part for part in opened if isinstance(part, ModelPart)]
        assert sum(b"Tanh" in part.content for part in unshared) == 3
        feeds = models.feeds_for(model)
        models.assert_same(session.run(None, feeds), models.reference(model, feeds))
