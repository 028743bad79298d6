"""Outputs against plain ONNX Runtime, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxsched.capturability import random_tensors
from onnxsched.comparison import Difference, Tolerances, compare
from onnxsched.inputs import random_inputs
from onnxsched.loading import Model
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import NumericsError
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings

_RUN_COUNT = 3
"""Runs on different inputs: a stale buffer shows in the second."""
_TOLERANCES = {"cuda": Tolerances(relative=1e-3), "cpu": Tolerances(relative=1e-4)}
"""TF32 keeps 10 bits of each factor, so another kernel may differ by 1e-3."""
_FLOAT16 = Tolerances(relative=2e-2)
"""Half precision keeps 10 bits of everything, and rounds after every operator."""


@dataclass(frozen=True)
class PlainRuns:
    """What plain ONNX Runtime computes from seeded inputs."""

    names: tuple[str, ...]
    """The model's outputs."""
    feeds: tuple[Mapping[str, np.ndarray], ...]
    """The inputs of each run."""
    outputs: tuple[list[Any], ...]
    """The outputs of each run."""


def run_plain(model: Model, device: Device, seed: int, custom_ops: tuple[str, ...]) -> PlainRuns:
    """Run the model as it was given, in one plain session made and closed here.

    Raises:
        ModelError: ORT refuses the model.
    """
    names = tuple(value.name for value in model.baseline.graph.output)
    feeds = tuple(
        random_inputs(model.baseline, model.tensors, seed + number) for number in range(_RUN_COUNT)
    )
    settings = SessionSettings(device, host_operators=True, custom_ops=custom_ops)
    with OrtSession(ModelSource(model.baseline, model.tensors).whole(), settings) as plain:
        return PlainRuns(names, feeds, tuple(plain.run(feed, names) for feed in feeds))


def differences_from(model: Model, session: Session, plain: PlainRuns) -> tuple[Difference, ...]:
    """How far a session is from plain ORT, for every output that no random number reaches."""
    answers = iter(plain.outputs)
    found = compare(
        lambda feed: session.run(plain.names, feed),
        lambda feed: next(answers),
        plain.names,
        plain.feeds,
        _FLOAT16 if model.precision == "fp16" else _TOLERANCES[session.device.kind],
    )
    drawn = random_tensors(model.baseline)
    return tuple(difference for difference in found if difference.output not in drawn)


def check_numerics(model: Model, session: Session, plain: PlainRuns) -> tuple[Difference, ...]:
    """Compare a scheduled session with plain ORT.

    Returns:
        The difference of every output that no random number reaches.

    Raises:
        NumericsError: An output differs by more than rounding.
    """
    differences = differences_from(model, session, plain)
    for difference in differences:
        if not difference.is_within:
            raise NumericsError(
                f"Output '{difference.output}' differs from plain ONNX Runtime by "
                f"{difference.max_absolute:.3g} (relative {difference.relative:.3g}), so nothing "
                "was written; please report the model."
            )
    return differences
