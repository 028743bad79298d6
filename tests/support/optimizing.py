"""What tests of the optimizer share: models on disk, loaded models, and plain ONNX Runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import onnxsched
from onnxsched.loading import Model, load_model
from onnxsched.shapes import tensor_types
from sample_models import build
from support.models import CPU, MODELS, Array

Shapes = Mapping[str, tuple[int, ...]]


def parsed(
    text: str, *, opset: int = 17, ir_version: int = 10, functions: str = "", **weights: Array
) -> onnx.ModelProto:
    """A model as its text says: not checked, nothing inferred, nodes not named.

    Operators of the domain `local` are those of `functions`.
    """
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "local" : 1]>'
    model = onnx.parser.parse_model(f"{head} small {text} {functions}")
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()
    )
    return model


def saved(model: onnx.ModelProto, folder: Path, name: str = "in.onnx") -> Path:
    """The path of the model, written to a folder."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def loaded(model: onnx.ModelProto, folder: Path, shapes: Shapes | None = None) -> Model:
    """The model as the optimizer loads it for the CPU."""
    return load_model(saved(model, folder), CPU, shapes)


def as_it_is(proto: onnx.ModelProto, host_reasons: Mapping[str, str] | None = None) -> Model:
    """A model that ONNX Runtime has not seen."""
    return Model(proto, tensor_types(proto), host_reasons or {}, {}, proto)


def plain_outputs(path: Path, feeds: Mapping[str, Array]) -> list[Any]:
    """What plain ONNX Runtime computes from a file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


_CANCELLED = 1e-12
"""What may be left of numbers near 1 whose sum is 0, depending on the order."""


def assert_close(actual: Sequence[Any], expected: Sequence[Any], relative: float = 1e-4) -> None:
    """Check outputs, sequences among them, relative to the largest value of each."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, list):
            assert_close(one, other, relative)
            continue
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if other.dtype.kind == "f":
            largest = float(np.abs(other).max(initial=0.0))
            least = relative * largest + _CANCELLED
            np.testing.assert_allclose(one, other, rtol=relative, atol=least)
        else:
            np.testing.assert_array_equal(one, other)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def workplace(folder: Path) -> Path:
    """A folder with `tiny.onnx`, `out.onnx` (the same on two streams) and two strangers.

    `other.onnx` is another model, with other inputs; `garbage.onnx` is none at all.
    """
    saved(build("tiny"), folder, "tiny.onnx")
    onnxsched.optimize(
        folder / "tiny.onnx", folder / "out.onnx",
        device="cpu", policy="nimble", streams=2, cache_dir=None,
    )  # fmt: skip
    saved(MODELS["two_towers"](), folder, "other.onnx")
    (folder / "garbage.onnx").write_bytes(b"garbage")
    return folder
