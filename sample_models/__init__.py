"""A zoo of ONNX models with seeded random weights: nothing is downloaded.

`python -m sample_models NAME -o FILE` writes one; `build` returns it.
"""

from sample_models.errors import ModelError
from sample_models.registry import MODELS, SampleModel, build

__all__ = ["MODELS", "ModelError", "SampleModel", "build"]
