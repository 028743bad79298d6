"""A zoo of ONNX models with seeded random weights: nothing is downloaded.

`python -m sample_models NAME -o FILE` writes one; `build` returns it. Names are imported at first
use, so that the command can end well while onnx is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sample_models.errors import ModelError
    from sample_models.registry import MODELS, SampleModel, build

__all__ = ["MODELS", "ModelError", "SampleModel", "build"]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'sample_models' has no attribute '{name}'")
    home = "errors" if name == "ModelError" else "registry"
    return getattr(importlib.import_module(f"sample_models.{home}"), name)
