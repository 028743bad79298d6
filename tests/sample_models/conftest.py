from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from sample_models import MODELS, build

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Arrays], Arrays]


@pytest.fixture(scope="session", params=[*MODELS, "tiny"])
def built(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """Each model once a session, and only one of them in memory at a time."""
    return build(request.param)


@pytest.fixture(scope="session")
def load() -> Callable[[onnx.ModelProto], Run]:
    """Loads a model into ONNX Runtime and gives back a function that runs it."""

    def load_model(model: onnx.ModelProto) -> Run:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))

    return load_model


@pytest.fixture(scope="session")
def draw() -> Callable[[onnx.ModelProto, int], Arrays]:
    """Draws inputs that a model accepts, by a seed."""

    def draw_inputs(model: onnx.ModelProto, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        inputs: Arrays = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            shape = [dim.dim_value for dim in tensor.shape.dim]
            if value.name == "attention_mask":
                inputs[value.name] = np.ones(shape, np.int64)
            elif tensor.elem_type == onnx.TensorProto.INT64:
                inputs[value.name] = rng.integers(2 if "type" in value.name else 1000, size=shape)
            else:
                inputs[value.name] = rng.standard_normal(shape, dtype=np.float32)
        return inputs

    return draw_inputs
