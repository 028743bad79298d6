"""onnxsched: schedule the operators of an ONNX model over CUDA streams, and run the schedule.

    onnxsched.optimize("in.onnx", "out.onnx")
    with onnxsched.load("out.onnx") as session:
        outputs = session.run(None, {"input": array})

Names are imported at first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxsched.benchmark import BenchResult, bench
    from onnxsched.pipeline import OptimizeResult, optimize
    from onnxsched_runtime.errors import OnnxschedError
    from onnxsched_runtime.load import Session, load

__all__ = [
    "BenchResult",
    "OnnxschedError",
    "OptimizeResult",
    "Session",
    "bench",
    "load",
    "optimize",
]

_HOME = {
    "BenchResult": "onnxsched.benchmark",
    "OnnxschedError": "onnxsched_runtime.errors",
    "OptimizeResult": "onnxsched.pipeline",
    "Session": "onnxsched_runtime.load",
    "bench": "onnxsched.benchmark",
    "load": "onnxsched_runtime.load",
    "optimize": "onnxsched.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'onnxsched' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
