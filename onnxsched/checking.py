"""Outputs against plain ONNX Runtime, before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isinf
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxsched.capturability import random_tensors
from onnxsched.comparison import Difference, Tolerances, compare
from onnxsched.inputs import model_inputs, random_blamed
from onnxsched.loading import Model
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError, NumericsError
from onnxsched_runtime.load import Session
from onnxsched_runtime.model import node_reads
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource
from onnxsched_runtime.variant import Variant

_RUN_COUNT = 3
"""Runs on different inputs: a stale buffer shows in the second."""
_TOLERANCES = {"cuda": Tolerances(relative=1e-3), "cpu": Tolerances(relative=1e-4)}
"""TF32 keeps 10 bits of each factor, so another kernel may differ by 1e-3."""
_APART = 2.0
"""Two ways to compute in TF32 are each as far from full float32, and at worst on either side."""
_AT_MOST = Tolerances(relative=1e-2)
"""However far rounding takes a model."""
_FLOAT16 = 2e-2
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
    outputs_otherwise: Callable[[], tuple[list[Any], ...]]
    """Computes them rounded otherwise when it is first called: without TF32, on the CPU in one
    thread, whose number decides how some kernels sum."""


def run_plain(model: Model, device: Device, seed: int, custom_ops: tuple[str, ...]) -> PlainRuns:
    """Run the model as it was given, in one plain session made and closed here.

    Raises:
        ModelError: ORT refuses the model.
        RunError: The model fails on these inputs.
    """
    names = tuple(value.name for value in model.baseline.graph.output)
    feeds = tuple(model_inputs(model, seed + number) for number in range(_RUN_COUNT))
    source = ModelSource(model.baseline, model.tensors).whole()
    settings = SessionSettings(device, host_operators=True, custom_ops=custom_ops)

    def outputs(settings: SessionSettings) -> tuple[list[Any], ...]:
        with OrtSession(source, settings) as plain, random_blamed(feeds[0], model.given):
            return tuple(plain.run(feed, names) for feed in feeds)

    other = replace(settings, variant=Variant(tf32=False))
    if device.kind == "cpu":
        other = replace(settings, thread_count=1)
    return PlainRuns(names, feeds, outputs(settings), functools.cache(lambda: outputs(other)))


def check_portable(model: Model, device: Device, custom_ops: tuple[str, ...]) -> None:
    """Let plain ORT open the model as a whole, as it will be written; sessions hold parts of it.

    Raises:
        ModelError: It refuses.
    """
    source = ModelSource(model.proto, model.tensors).whole()
    settings = SessionSettings(
        device, host_operators=True, custom_ops=custom_ops, keeps_nodes=True
    )
    try:
        OrtSession(source, settings).close()
    except ModelError as error:
        raise ModelError(
            f"What was made of the model can't be opened ({str(error).rstrip('.')}), so nothing "
            "was written; please report the model."
        ) from error


def differences_from(model: Model, session: Session, plain: PlainRuns) -> tuple[Difference, ...]:
    """How far a session is from plain ORT, for every output that no random number reaches.

    A deep model carries what is rounded away further than a share of its outputs that fits all
    models. Where that share is exceeded, what counts is how far rounding takes plain ORT itself.
    """
    answers = tuple(session.run(plain.names, feed) for feed in plain.feeds)
    tolerances = _TOLERANCES[session.device.kind]
    half = plain.names if model.precision == "fp16" else _reached_by_half(model)
    tolerances = replace(tolerances, relative_of=dict.fromkeys(half, _FLOAT16))
    found = _compared(answers, plain, tolerances)
    if not all(one.is_within for one in found):
        rounding = _compared(plain.outputs_otherwise(), plain, tolerances)
        known = {one.output: _APART * one.max_absolute for one in rounding}
        near = _compared(answers, plain, replace(tolerances, absolute_of=known))
        capped = _compared(answers, plain, _AT_MOST)
        found = tuple(
            replace(a, is_within=a.is_within or (b.is_within and c.is_within))
            for a, b, c in zip(found, near, capped, strict=True)
        )
    drawn = random_tensors(model.baseline)
    return tuple(difference for difference in found if difference.output not in drawn)


def _how_far(difference: Difference) -> str:
    if isinf(difference.max_absolute) and difference.relative <= 1:
        return f"in {difference.relative:.1%} of its elements"
    return f"by {difference.max_absolute:.3g} (relative {difference.relative:.3g})"


def _reached_by_half(model: Model) -> set[str]:
    """The tensors that are in half precision, or computed from such."""
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    found = {weight.name for weight in model.proto.graph.initializer if weight.data_type in half}
    found.update(name for name, kind in model.tensors.items() if kind.element_type in half)
    for node in model.proto.graph.node:
        if found.intersection(node_reads(node)):
            found.update(filter(None, node.output))
    return found


def _compared(
    answers: tuple[list[Any], ...], plain: PlainRuns, tolerances: Tolerances
) -> tuple[Difference, ...]:
    given, expected = iter(answers), iter(plain.outputs)
    return compare(
        lambda feed: next(given),
        lambda feed: next(expected),
        plain.names,
        plain.feeds,
        tolerances,
    )


def check_numerics(model: Model, session: Session, plain: PlainRuns) -> tuple[Difference, ...]:
    """Compare a scheduled session with plain ORT.

    Returns:
        The difference of every output that no random number reaches.

    Raises:
        NumericsError: An output differs by more than rounding.
    """
    differences = differences_from(model, session, plain)
    is_asked_for = model.precision == "fp16"
    instead = "leave --precision fp16 out" if is_asked_for else "please report the model"
    for difference in differences:
        if not difference.is_within:
            raise NumericsError(
                f"Output '{difference.output}' differs from plain ONNX Runtime "
                f"{_how_far(difference)}, so nothing was written; {instead}."
            )
    return differences
