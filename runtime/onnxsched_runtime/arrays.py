"""Inputs and outputs in `.npy` files."""

from __future__ import annotations

import os
import re
import tempfile
import tokenize
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsched_runtime.errors import OnnxschedError, UsageError

_DAMAGE = (
    OSError, ValueError, EOFError, ArithmeticError, TypeError, SyntaxError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip
"""What numpy can raise of a file that is none of its own."""


def read_array(name: str, file: Path) -> np.ndarray:
    """Read the value of input `name` from a `.npy` file.

    Raises:
        UsageError: There is no such file, or it is no array.
    """
    if not os.path.isfile(file):
        raise UsageError(f"There is no file '{file}' for input '{name}'.")
    try:
        with file.open("rb") as stream:
            array = np.load(stream, allow_pickle=False)
    except _DAMAGE as error:
        raise UsageError(f"'{file}' is no .npy file; save input '{name}' with numpy.") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"'{file}' holds several arrays; give one .npy file an input.")
    return array


def write_arrays(outputs: Mapping[str, Any], folder: Path) -> None:
    """Write every output or none; each element of a sequence has a file of its own.

    Raises:
        OnnxschedError: They can't be written.
    """
    files: dict[str, Any] = {}
    for name, value in outputs.items():
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        while any(file.startswith(f"{stem}.") for file in files):
            stem += "_"
        if isinstance(value, list):
            files |= {f"{stem}.{number}.npy": element for number, element in enumerate(value)}
        else:
            files[f"{stem}.npy"] = value
    if taken := [file for file in files if os.path.isdir(folder / file)]:
        raise OnnxschedError(
            f"The outputs can't be written to '{folder}' ('{taken[0]}' is a folder there)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnxsched-", dir=folder) as scratch:
            for file, value in files.items():
                np.save(Path(scratch, file), np.asarray(value))
            for file in files:
                os.replace(Path(scratch, file), folder / file)
    except (OSError, ValueError) as error:
        raise OnnxschedError(f"The outputs can't be written to '{folder}' ({error}).") from error
