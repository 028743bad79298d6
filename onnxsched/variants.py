"""Which variants of a model are right, and how fast each is in one stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from onnxsched.checking import PlainRuns, differences_from
from onnxsched.loading import Model
from onnxsched.profiling.measure import Progress
from onnxsched.racing import race
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import DeviceError, OnnxschedError
from onnxsched_runtime.load import Session
from onnxsched_runtime.lowering import lower
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

_NEAR = 1.12
"""A variant this much slower in one stream may still win in several."""
_SEARCHED_COUNT = 2
_PREPARATION_SHARE = 2 / 3
"""Of the race's budget: what takes longer to prepare once would have to be prepared for trials,
for each finalist and for the check, and cuDNN may take a second for every convolution."""


@dataclass(frozen=True)
class VariantOutcome:
    """A variant, its model, and its times in one stream."""

    model: Model
    """Lowered."""
    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """Median time in one stream."""
        return statistics.median(self.samples_us)


def possible_variants(model: Model, device: Device) -> tuple[Variant, ...]:
    """What can make a difference, the most promising first: only convolutions have a choice."""
    convolves = any("Conv" in node.op_type for node in model.proto.graph.node)
    if device.kind == "cpu" or model.host_reasons or not convolves:
        return (DEFAULT_VARIANT,)
    return (
        DEFAULT_VARIANT,
        Variant("nhwc", fuse_conv_bias=True),
        Variant("nhwc"),
        Variant(fuse_conv_bias=True),
        Variant("nhwc", fuse_conv_bias=True, conv_search="heuristic"),
    )


def race_variants(
    model: Model,
    device: Device,
    variants: Sequence[Variant],
    plain: PlainRuns,
    *,
    budget_s: float,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> tuple[VariantOutcome, ...]:
    """Run each variant as one session, drop those that are wrong, and time the rest.

    What ORT refuses is dropped too, except for the first variant, which must work; and what takes
    so long to prepare that scheduling it would. No more are tried after `budget_s` seconds.

    Returns:
        The variants that are right, the fastest first.

    Raises:
        ModelError: ORT refuses the first variant.
    """
    deadline = time.monotonic() + budget_s
    right: list[Model] = []
    with ExitStack() as stack:
        sessions: list[Session] = []
        for number, variant in enumerate(variants):
            if number and time.monotonic() > deadline:
                break
            progress("trying variants", number, len(variants))
            start = time.monotonic()
            try:
                lowered = lowered_model(model, variant, device, custom_ops)
                session = Session(
                    model.proto,
                    _one_stream(model, variant, device),
                    custom_ops=custom_ops,
                    lowered=lowered.source,
                )
            except DeviceError:
                raise
            except OnnxschedError:
                if not number:
                    raise
                continue
            is_right = not number or _is_right(model, session, plain)
            is_quick = time.monotonic() - start <= _PREPARATION_SHARE * budget_s
            if number and not (is_right and is_quick):
                session.close()
                continue
            stack.callback(session.close)
            right.append(lowered)
            sessions.append(session)
        samples = race(sessions, plain.feeds[0], progress)
    outcomes = [VariantOutcome(m, s) for m, s in zip(right, samples, strict=True)]
    return tuple(sorted(outcomes, key=lambda outcome: outcome.median_us))


def promising(outcomes: Sequence[VariantOutcome]) -> tuple[VariantOutcome, ...]:
    """The variants worth scheduling: the fastest, and one near it of another layout."""
    best = outcomes[0]
    near = [
        outcome
        for outcome in outcomes[1:]
        if outcome.median_us <= _NEAR * best.median_us
        and outcome.model.variant.layout != best.model.variant.layout
    ]
    return (best, *near[: _SEARCHED_COUNT - 1])


def lowered_model(
    model: Model, variant: Variant, device: Device, custom_ops: tuple[str, ...]
) -> Model:
    """The model as the sessions of a variant execute it.

    What must stay on the host can't be lowered for a GPU: such a model stays as it is.

    Raises:
        ModelError: ORT refuses to lower it.
    """
    if model.host_reasons:
        return replace(model, variant=variant)
    source = lower(ModelSource(model.proto, model.tensors, variant), device, custom_ops)
    return replace(model, proto=source.model, tensors=source.tensors, variant=variant)


def _one_stream(model: Model, variant: Variant, device: Device) -> Annotation:
    names = [node.name for node in model.proto.graph.node]
    placements = dict.fromkeys(names, Placement(device, 0))
    return Annotation(placements, model.tensors, model.host_reasons, variant)


def _is_right(model: Model, session: Session, plain: PlainRuns) -> bool:
    try:
        differences = differences_from(model, session, plain)
    except OnnxschedError:
        return False
    return session.refusal is None and all(found.is_within for found in differences)
