"""Run an annotated model on arrays in files."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsched.inputs import random_inputs
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.errors import OnnxschedError, UsageError
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import read_model


def run_files(
    path: str | os.PathLike[str],
    inputs: Mapping[str, Path],
    output_dir: Path | None,
    *,
    seed: int = 0,
    custom_ops: Sequence[str] = (),
) -> dict[str, Any]:
    """Run once; inputs come from `.npy` files, outputs go to `.npy` files.

    Args:
        path: An annotated model.
        inputs: A file for each input; inputs that are not named are drawn at random.
        output_dir: Made if it is not there; None writes nothing.
        seed: Of the random inputs.
        custom_ops: Shared libraries with custom operators.

    Returns:
        The outputs by name.

    Raises:
        UsageError: A file is missing or no array, or does not fit the input.
        ModelError: The model can't be read, or carries no schedule.
        DeviceError: The schedule's device is not on this machine.
        OnnxschedError: An output can't be written.
    """
    model = read_model(path)
    annotation = read_annotation(model)
    feeds: dict[str, Any] = dict(random_inputs(model, annotation.tensors, seed))
    feeds |= {name: _read_array(name, file) for name, file in inputs.items()}
    names = [value.name for value in model.graph.output]
    with Session(model, annotation, custom_ops=tuple(custom_ops)) as session:
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
    if output_dir is not None:
        _write_arrays(outputs, output_dir)
    return outputs


def _read_array(name: str, file: Path) -> np.ndarray:
    if not file.is_file():
        raise UsageError(f"There is no file '{file}' for input '{name}'.")
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"'{file}' is no .npy file; save input '{name}' with numpy.") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"'{file}' holds several arrays; give one .npy file an input.")
    return array


def _write_arrays(outputs: Mapping[str, Any], folder: Path) -> None:
    """Write every output or none; each element of a sequence has a file of its own."""
    files: dict[str, Any] = {}
    for name, value in outputs.items():
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        while any(file.startswith(f"{stem}.") for file in files):
            stem += "_"
        if isinstance(value, list):
            files |= {f"{stem}.{number}.npy": element for number, element in enumerate(value)}
        else:
            files[f"{stem}.npy"] = value
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnxsched-", dir=folder) as scratch:
            for file, value in files.items():
                np.save(Path(scratch, file), np.asarray(value))
            for file in files:
                os.replace(Path(scratch, file), folder / file)
    except (OSError, ValueError) as error:
        raise OnnxschedError(f"The outputs can't be written to '{folder}' ({error}).") from error
