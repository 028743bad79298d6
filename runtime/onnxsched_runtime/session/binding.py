"""ONNX Runtime, imported, and the libraries that it links to on a GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

# Read when it is imported: it counts its users, and warns on stderr where HOME can't be written.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from onnxsched_runtime import cuda

__all__ = [
    "CPU_PROVIDER",
    "CUDA_PROVIDER",
    "complaint",
    "float16_converter",
    "is_cuda_built",
    "library_versions",
    "load_cuda_libraries",
    "missing_cuda_library",
    "onnxruntime",
]

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?|/\S+:\d+ [^)]*\) "
    r"|\b\w+\.(?:cc|cpp|h):\d+ (?:[\w:]+ )?"
    r"|ONNX Runtime only \*guarantees\*.*(?=Current official)|\[with [^\]]*\] |\s*; GPU=\d+ ;.*"
)


def library_versions() -> dict[str, str]:
    """Versions of ONNX Runtime and how it was built."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_build": onnxruntime.get_build_info(),
        "onnx": importlib.metadata.version("onnx"),
        "numpy": np.__version__,
    }


def is_cuda_built() -> bool:
    """Whether this ORT was built with the CUDA provider; says nothing of whether it loads."""
    return CUDA_PROVIDER in onnxruntime.get_available_providers()


@functools.cache
def load_cuda_libraries() -> None:
    """Load what the CUDA provider links to: from the wheels beside ORT, else as torch finds it."""
    cuda.keep_blas_workspace()
    onnxruntime.set_default_logger_severity(3)
    if not (Path(onnxruntime.__file__).parent.parent / "nvidia").is_dir():
        cuda.load_torch()
    onnxruntime.preload_dlls()


def missing_cuda_library() -> str | None:
    """Why the CUDA provider's library does not load here; None where it does."""
    stem = "onnxruntime_providers_cuda"
    name = f"{stem}.dll" if os.name == "nt" else f"lib{stem}.so"
    cuda.device_count()
    load_cuda_libraries()
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / name))
    except OSError as error:
        return str(error)
    return None


def float16_converter() -> Any:
    """ONNX Runtime's module that makes models half precision; it takes a while to import."""
    from onnxruntime.transformers import float16

    return float16


def complaint(error: BaseException) -> str:
    """What ORT complains of, without its codes, our scratch files and its source lines."""
    text = str(error).strip() or repr(error)
    return _NOISE.sub("", text.splitlines()[0]).rstrip(".")
