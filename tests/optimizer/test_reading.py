"""Models are read as ONNX Runtime reads them, and their weights are not written over."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest

import onnxsched
from onnxsched.reading import read_valid_model
from onnxsched_runtime import files
from onnxsched_runtime.errors import ModelError, UsageError
from support.models import assert_same, feeds_for, model_of, reference, weight


def old(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same at opset 13, where ONNX has no norms and ONNX Runtime has."""
    model.opset_import[0].version = 13
    return model


def layer_norm() -> onnx.ModelProto:
    return model_of(
        """(float[2,8] x) => (float[2,8] y) {
            a = LayerNormalization<axis = -1, epsilon = 1e-5>(x, scale, bias)
            y = Relu(a)
        }""",
        scale=weight(8),
        bias=weight(8),
    )


def test_norms_of_onnx_runtimes_are_read_at_any_opset(tmp_path: Path) -> None:
    model = old(layer_norm())
    onnx.save(model, tmp_path / "in.onnx")
    onnxsched.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", device="cpu:0", cache_dir=None, budget_s=0.5
    )
    onnxsched.optimize(
        tmp_path / "out.onnx", tmp_path / "more.onnx", device="cpu:0", cache_dir=None, budget_s=0.5
    )
    feeds = feeds_for(model)
    with onnxsched.load(tmp_path / "more.onnx") as session:
        assert_same(session.run(None, feeds), reference(model, feeds))


def test_norms_are_checked_all_the_same(tmp_path: Path) -> None:
    for model in (layer_norm(), old(layer_norm())):
        del model.graph.node[0].input[1:]
        onnx.save(model, tmp_path / "in.onnx")
        with pytest.raises(ModelError, match="is no valid ONNX model"):
            read_valid_model(tmp_path / "in.onnx")
    assert not onnx.defs.has("LayerNormalization", 1, "")


def with_weights_beside(path: Path, location: str) -> None:
    model = model_of("(float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }", w=weight(64, 64))
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


def test_weights_that_are_read_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FILE_NBYTES", 1000)  # in place of 2 GiB
    source, target = tmp_path / "old.onnx", tmp_path / "model.onnx"
    with_weights_beside(source, "model.onnx.data")
    before = (tmp_path / "model.onnx.data").read_bytes()
    with pytest.raises(UsageError, match=r"would lie beside '.*model\.onnx\.data', which holds"):
        onnxsched.optimize(source, target, device="cpu:0", cache_dir=None, budget_s=0.5)
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    with pytest.raises(UsageError, match="is a file that this command reads"):
        files.require_target("--output", tmp_path / "model.onnx.data", models=[source])
    with_weights_beside(target, "model.onnx.data")
    files.require_target("--output", target, models=[target])


def test_weights_of_models_that_fit_into_a_file_may_lie_anywhere(tmp_path: Path) -> None:
    source, target = tmp_path / "old.onnx", tmp_path / "model.onnx"
    with_weights_beside(source, "model.onnx.data")
    files.require_target("--output", target, models=[source])


@pytest.mark.parametrize("ir_version", [0, 3, 99])
def test_what_onnx_runtime_does_not_ask_for_may_be_missing(
    tmp_path: Path, ir_version: int
) -> None:
    model = model_of("(float[1,4] x) => (float[1,2] y) { y = MatMul(x, w) }", w=weight(4, 2))
    feeds = feeds_for(model)
    expected = reference(model, feeds)
    model.graph.name, model.ir_version = "", ir_version
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    assert_same(reference(read_valid_model(tmp_path / "in.onnx"), feeds), expected)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_that_is_replaced_keeps_who_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    path.chmod(0o640)
    files.write_model(layer_norm(), path)
    assert path.stat().st_mode & 0o777 == 0o640
