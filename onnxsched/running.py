"""Run an annotated model on arrays in files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsched.inputs import random_blamed, random_inputs
from onnxsched_runtime.annotation import read_annotation
from onnxsched_runtime.arrays import read_array, write_arrays
from onnxsched_runtime.files import read_model
from onnxsched_runtime.load import Session


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
        UsageError: A file is missing or no array, or does not fit the input; or an output to be
            written is no array.
        ModelError: The model can't be read, or carries no schedule.
        DeviceError: The schedule's device is not on this machine.
        OnnxschedError: An output can't be written.
    """
    model = read_model(path)
    annotation = read_annotation(model)
    given = {name: read_array(name, file) for name, file in inputs.items()}
    feeds = random_inputs(model, annotation.tensors, seed, given)
    names = [value.name for value in model.graph.output]
    session = Session(model, annotation, custom_ops=tuple(custom_ops))
    with session, random_blamed(feeds, given):
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
    if output_dir is not None:
        write_arrays(outputs, output_dir)
    return outputs
