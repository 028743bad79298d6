"""ONNX Runtime: its sessions, its optimizations, and what it needs on a GPU.

Nothing else touches ONNX Runtime.
"""

from onnxsched_runtime.session.binding import (
    is_cuda_built,
    library_versions,
    load_cuda_libraries,
    missing_cuda_library,
)
from onnxsched_runtime.session.optimizing import lower_to_file, optimize_file, to_float16
from onnxsched_runtime.session.running import BoundRun, OrtSession

__all__ = [
    "BoundRun",
    "OrtSession",
    "is_cuda_built",
    "library_versions",
    "load_cuda_libraries",
    "lower_to_file",
    "missing_cuda_library",
    "optimize_file",
    "to_float16",
]
