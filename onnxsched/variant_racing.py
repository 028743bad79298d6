"""Which variants and rewrites of a model are right, and how fast each is in one stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from onnxsched.checking import PlainRuns, differences_from
from onnxsched.loading import NO_REWRITE, Model
from onnxsched.profiling.measure import Progress
from onnxsched.racing import race
from onnxsched.rewriting import Rewrites, joined, rewritten
from onnxsched.variants import lowered_model
from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import DeviceError, OnnxschedError
from onnxsched_runtime.load import Session
from onnxsched_runtime.variant import Variant

_NEAR = 1.12
"""A variant this much slower in one stream may still win in several."""
_SEARCHED_COUNT = 2
_REWRITE_COUNT = 2
"""More would leave too little of the budget to each."""
_PREPARATION_SHARE = 2 / 3
"""Of the race's budget: what takes longer to prepare once would have to be prepared for trials,
for each finalist and for the check, and cuDNN may take a second for every convolution."""
_AS_LONG = 2.0
"""A rewrite may take so much longer to prepare than what it is made of, whatever that takes."""


@dataclass(frozen=True)
class VariantOutcome:
    """A variant of a portable model, and its times in one stream."""

    portable: Model
    """Rewritten or as it was loaded."""
    model: Model
    """The same lowered."""
    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """Median time in one stream."""
        return statistics.median(self.samples_us)


@dataclass(frozen=True)
class Raced:
    """What is right of all that was tried, in each case the fastest first."""

    variants: tuple[VariantOutcome, ...]
    """Of the model as it was loaded."""
    alike: tuple[VariantOutcome, ...]
    """The fastest of them, and its rewrites that leave operators side by side as they are."""
    merged: tuple[VariantOutcome, ...]
    """The fastest of these, and its rewrites that don't."""


def race_variants(
    model: Model,
    device: Device,
    variants: Sequence[Variant],
    rewrites_of: Callable[[Variant], Rewrites],
    plain: PlainRuns,
    *,
    refusals_of: Callable[[Model], Mapping[str, str]],
    budget_s: float,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> Raced:
    """Run each variant as one session, drop those that are wrong, and time the rest.

    Where convolutions can be fused, sessions are not tried channels last: they launch the same
    kernels, and further ones, and take longer to prepare.

    What ORT refuses is dropped too, except for the first variant, which must work; and what takes
    so long to prepare that scheduling it would. The rewrites are then raced in the fastest
    variant, against it: first those that leave operators side by side as they are, then the others
    on top of the best; not those with an operator that can't be captured, as a Split into unequal
    pieces may be. No more variants, and of both kinds no more rewrites, are tried after half the
    budget each.

    Args:
        model: The portable model.
        device: Where to measure.
        variants: How to execute it.
        rewrites_of: What to make of it where a variant is the fastest.
        plain: What it must compute.
        refusals_of: Why operators of a lowered model can't be captured, found out elsewhere: it
            may end the process.
        budget_s: For all of this but for finding that out.
        custom_ops: Libraries of custom operators.
        progress: Told what is being done.

    Raises:
        ModelError: ORT refuses the first variant.
    """
    feeds = plain.feeds[0]
    with cuda.one_graph_stream(), ExitStack() as stack:
        attempts = _Attempts(
            model, device, plain, refusals_of, budget_s / 2, custom_ops, progress, stack
        )
        first = [v for v in variants if v.fuses or v.layout == "nchw"]
        entrants = attempts.prepare([(NO_REWRITE, v) for v in first], is_needed=True)
        if not any(entrant.model.variant.fuses for entrant in entrants):
            rest = [(NO_REWRITE, v) for v in variants if v not in first]
            entrants += attempts.prepare(rest)
        found = _timed(entrants, feeds, progress)
        best = found[0].model.variant
        base = next(entrant for entrant in entrants if entrant.model is found[0].model)
        rewrites, alike, merged = rewrites_of(best), found[:1], found[:1]
        if others := attempts.prepare([(n, best) for n in rewrites.alike], base.prepared_s):
            alike = _timed([base, *others], feeds, progress)
            base = next(one for one in (base, *others) if one.model is alike[0].model)
            merged = alike[:1]
        names = [joined(base.portable.rewrite, name) for name in rewrites.merged]
        if others := attempts.prepare([(name, best) for name in names], base.prepared_s):
            merged = _timed([base, *others], feeds, progress)
        return Raced(found, alike, merged)


@dataclass(frozen=True)
class _Entrant:
    """What takes part in a race."""

    portable: Model
    model: Model
    """Lowered."""
    session: Session
    prepared_s: float = 0.0
    """What it took to prepare."""


@dataclass(frozen=True)
class _Attempts:
    """What preparing for a race needs."""

    model: Model
    """As it was loaded."""
    device: Device
    plain: PlainRuns
    refusals_of: Callable[[Model], Mapping[str, str]]
    budget_s: float
    """For all that is prepared together, but for what the model can't do without."""
    custom_ops: tuple[str, ...]
    progress: Progress
    stack: ExitStack
    """Closes the sessions."""

    def prepare(
        self,
        wanted: Sequence[tuple[str, Variant]],
        usual_s: float = 0.0,
        *,
        is_needed: bool = False,
    ) -> list[_Entrant]:
        """Make a session of each rewrite and variant, while the budget lasts.

        Args:
            wanted: Their names, and the variants that they are for.
            usual_s: What such a session takes to prepare, as far as that is known.
            is_needed: The model can't do without the first one.

        Raises:
            ModelError: ORT refuses the first one, and it is needed.
        """
        deadline = time.monotonic() + self.budget_s
        entrants = []
        for number, (rewrite, variant) in enumerate(wanted):
            is_sure = not number and is_needed
            if not is_sure and time.monotonic() > deadline:
                break
            self.progress("trying variants", number, len(wanted))
            portable = rewritten(self.model, rewrite)
            try:
                lowered = lowered_model(portable, variant, self.device, self.custom_ops)
                pause = time.monotonic()
                is_capturable = rewrite == NO_REWRITE or not self.refusals_of(lowered)
                start = time.monotonic()  # kernels are chosen, and operators profiled, but once
                deadline += start - pause
                if not is_capturable:
                    continue
                entrant = self._entrant(portable, lowered)
            except DeviceError:
                raise
            except OnnxschedError:
                if is_sure:
                    raise
                continue
            prepared_s = time.monotonic() - start
            is_right = is_sure or _is_right(self.model, entrant.session, self.plain)
            is_quick = prepared_s <= max(_PREPARATION_SHARE * self.budget_s, _AS_LONG * usual_s)
            if is_sure:
                deadline = time.monotonic() + self.budget_s
            if is_sure or (is_right and is_quick):
                self.stack.callback(entrant.session.close)
                entrants.append(replace(entrant, prepared_s=prepared_s))
            else:
                entrant.session.close()
        return entrants

    def _entrant(self, portable: Model, lowered: Model) -> _Entrant:
        session = Session(
            portable.proto,
            _one_stream(portable, lowered.variant, self.device),
            custom_ops=self.custom_ops,
            lowered=lowered.source,
        )
        return _Entrant(portable, lowered, session)


def _timed(
    entrants: Sequence[_Entrant], feeds: Mapping[str, Any], progress: Progress
) -> tuple[VariantOutcome, ...]:
    """The outcome of each, from the same rounds, the fastest first."""
    samples = race([entrant.session for entrant in entrants], feeds, progress)
    outcomes = [
        VariantOutcome(entrant.portable, entrant.model, kept)
        for entrant, kept in zip(entrants, samples, strict=True)
    ]
    return tuple(sorted(outcomes, key=lambda outcome: outcome.median_us))


def promising(raced: Raced) -> tuple[VariantOutcome, ...]:
    """What is worth scheduling: the best of one structure, others near it, and another layout."""
    best, fastest = raced.alike[0], raced.merged[0]
    layouts = [
        outcome
        for outcome in raced.variants[1:]
        if outcome.median_us <= _NEAR * raced.variants[0].median_us
        and outcome.model.variant.layout != best.model.variant.layout
    ]
    merged = [
        outcome
        for outcome in raced.merged
        if outcome.median_us <= _NEAR * fastest.median_us
        and outcome.model.rewrite != best.model.rewrite
    ]
    return (best, *merged[:_REWRITE_COUNT], *layouts[: _SEARCHED_COUNT - 1])


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
