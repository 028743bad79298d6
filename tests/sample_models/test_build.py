import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import pytest

import sample_models
from sample_models import MODELS, ModelError, build
from sample_models.randwire import watts_strogatz

Arrays = dict[str, npt.NDArray[Any]]
Load = Callable[[onnx.ModelProto], Callable[[Arrays], Arrays]]
Draw = Callable[[onnx.ModelProto, int], Arrays]
Shapes = dict[str, list[int]]

PACKAGE = Path(sample_models.__file__).parent

LAYERS = range(6)
T5_PRESENT = {
    f"present.{n}.self.{part}": [2, 8, 8, 64] for n in LAYERS for part in ("key", "value")
}


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> Shapes:
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize(
    ("name", "sizes", "outputs"),
    [
        ("googlenet", {"image": 97, "batch": 2}, {"logits": [2, 1000]}),
        ("inception_v3", {"image": 107, "batch": 2}, {"logits": [2, 1000]}),
        ("squeezenet", {"image": 50, "batch": 2}, {"logits": [2, 1000]}),
        ("nasnet_mobile", {"image": 75, "batch": 2}, {"logits": [2, 1000]}),
        ("randwire", {"image": 33, "batch": 2}, {"logits": [2, 1000]}),
        ("t5_encoder", {"sequence": 7, "batch": 2}, {"last_hidden_state": [2, 7, 512]}),
        ("t5_decoder", {"sequence": 7, "batch": 2}, {"logits": [2, 1, 32128], **T5_PRESENT}),
        ("deepfm", {"batch": 2}, {"probability": [2, 1]}),
        ("tiny", {"image": 9, "batch": 2}, {"logits": [2, 10]}),
    ],
)
def test_sizes_are_honoured(
    name: str, sizes: dict[str, int], outputs: Shapes, load: Load, draw: Draw
) -> None:
    model = build(name, **sizes)
    assert _shapes(model.graph.output) == outputs
    for shape in _shapes(model.graph.input).values():
        assert shape[0] == sizes["batch"]
        assert shape[2:] in ([], [sizes.get("image")] * 2, [sizes.get("sequence"), 64])
    inputs = draw(model, 1)
    both = load(model)(inputs)
    assert {name: list(value.shape) for name, value in both.items()} == outputs
    # The samples of a batch do not mix, and its size does not change the weights.
    single = load(build(name, **{**sizes, "batch": 1}))
    last = single({name: value[1:] for name, value in inputs.items()})
    for name, value in last.items():
        np.testing.assert_allclose(both[name][1:], value, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("shallow_transformers")
def test_bert_ignores_what_the_mask_hides(load: Load, draw: Draw) -> None:
    model = build("bert", sequence=5, batch=2)
    assert _shapes(model.graph.output) == {
        "last_hidden_state": [2, 5, 768],
        "pooler_output": [2, 768],
    }
    run = load(model)
    inputs = draw(model, 1)
    seen = run(inputs)["last_hidden_state"]
    inputs["attention_mask"][:, 3:] = 0
    hidden = run(inputs)["last_hidden_state"]
    inputs["input_ids"][:, 3:] += 1
    changed = run(inputs)["last_hidden_state"]
    assert np.abs(seen - hidden)[:, :3].max() > 0.01
    np.testing.assert_allclose(hidden[:, :3], changed[:, :3], atol=1e-5)
    assert np.abs(hidden - changed)[:, 3:].max() > 0.01


def test_t5_encoder_ignores_what_the_mask_hides(load: Load, draw: Draw) -> None:
    model = build("t5_encoder", sequence=5)
    run = load(model)
    inputs = draw(model, 1)
    inputs["attention_mask"][:, 3:] = 0
    hidden = run(inputs)["last_hidden_state"]
    inputs["input_ids"][:, 3:] += 1
    changed = run(inputs)["last_hidden_state"]
    np.testing.assert_allclose(hidden[:, :3], changed[:, :3], atol=1e-5)
    assert np.abs(hidden - changed)[:, 3:].max() > 0.01


def test_t5_buckets_distances_both_ways() -> None:
    model = build("t5_encoder", sequence=200)
    (buckets,) = (
        onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name == "encoder/position_bias/buckets"
    )
    # A position sees what is before it in the lower half, what is after it in the upper half.
    assert buckets[9:0:-1, 9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[9, 9:0:-1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [buckets[199, 199 - far] for far in (11, 12, 15, 16, 64, 128, 199)] == [
        8, 9, 9, 10, 14, 15, 15,
    ]  # fmt: skip


def test_t5_decoder_appends_to_its_cache(load: Load, draw: Draw) -> None:
    model = build("t5_decoder", sequence=3)
    inputs = draw(model, 1)
    present = load(model)(inputs)
    for layer in LAYERS:
        for part in ("key", "value"):
            kept = present[f"present.{layer}.self.{part}"][:, :, :3]
            np.testing.assert_array_equal(kept, inputs[f"past.{layer}.self.{part}"])


@pytest.mark.parametrize(
    "name",
    ["tiny", "googlenet", "squeezenet", "nasnet_mobile", "randwire", "t5_encoder", "deepfm"],
)
def test_building_twice_gives_the_same_bytes(name: str) -> None:
    assert build(name).SerializeToString() == build(name).SerializeToString()


def test_the_committed_tiny_model_is_the_builders() -> None:
    assert (PACKAGE / "tiny.onnx").read_bytes() == build("tiny").SerializeToString()


def test_models_are_described_and_read_only() -> None:
    assert "tiny" not in MODELS
    for name, model in MODELS.items():
        assert model.name == name
        assert model.description
        assert "\n" not in model.description
    with pytest.raises(FrozenInstanceError):
        MODELS["bert"].name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        MODELS["other"] = MODELS["bert"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("resnet", {}, "there is no model 'resnet': choose one of googlenet, "),
        ("googlenet", {"sequence": 8}, "googlenet has no sequence to size"),
        ("bert", {"image": 8}, "bert has no image to size"),
        ("deepfm", {"sequence": 8}, "deepfm has no sequence to size"),
        ("deepfm", {"batch": 0}, "batch is 0 for deepfm: ask for 1 to "),
        ("deepfm", {"batch": 10**20}, "ask for 1 to "),
        ("googlenet", {"image": -1}, "image is -1 for googlenet"),
        ("googlenet", {"image": 1}, "too small for googlenet: maxpool1 "),
        ("inception_v3", {"image": 74}, "too small for inception_v3: mixed7a/"),
        ("squeezenet", {"image": 2}, "too small for squeezenet: conv1/conv "),
        ("nasnet_mobile", {"image": 2}, "too small for nasnet_mobile: stem/conv "),
        ("bert", {"sequence": 513}, "512 positions, not 513"),
        ("t5_encoder", {"sequence": 4097}, "ask for 4096 or less"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(name, **sizes)


def test_importing_the_package_loads_no_framework() -> None:
    script = "import sys, sample_models; print(sys.modules.keys() & {'torch', 'onnxruntime'})"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, "set()")


def test_unwired_small_world_is_the_ring() -> None:
    ring = watts_strogatz(6, 2, 0.0, np.random.default_rng(0))
    assert ring == [(0, 1), (0, 5), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_small_world_keeps_its_edges_simple_and_forward() -> None:
    wirings = [watts_strogatz(32, 4, 0.75, np.random.default_rng(seed)) for seed in range(20)]
    for edges in wirings:
        assert len(set(edges)) == 64
        assert all(0 <= source < target < 32 for source, target in edges)
        assert {node for edge in edges for node in edge} == set(range(32))
    assert len({tuple(edges) for edges in wirings}) == 20
    near = sum(target - source in (1, 2, 30, 31) for edges in wirings for source, target in edges)
    # A quarter of the edges stays; a moved one is near again in about one case of ten.
    assert 0.25 < near / (20 * 64) < 0.45
