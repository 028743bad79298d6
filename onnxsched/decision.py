"""The decision that tuning came to, and its place in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched.tuning import Outcome, Subject
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ScheduleError
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


@dataclass(frozen=True)
class Decision:
    """The schedule that was chosen, and what was measured on the way."""

    schedule: Schedule
    policy: str
    variant: Variant
    measured_us: float
    sequential_us: float
    """The model as one session of the default variant in the same rounds."""
    alternatives: tuple[Mapping[str, Any], ...]
    """Every candidate: policy, streams, predicted, tried and measured times."""
    operators: Mapping[str, tuple[float, str]]
    """Median solo time in microseconds and bound, by node name."""
    refusals: Mapping[str, str]
    """Why a node can't be captured, for those where the attempt failed."""


def decide(outcomes: Sequence[Outcome], subjects: Sequence[Subject], policy: str) -> Decision:
    """Choose the fastest outcome, or the fastest of the one policy that was asked for.

    Args:
        outcomes: From `tune`, the fastest finalist first.
        subjects: What was tuned.
        policy: `auto`, or a policy that is obeyed even where sequential is faster.
    """
    measured = [outcome for outcome in outcomes if outcome.measured_us is not None]
    allowed = [o for o in measured if policy in ("auto", o.candidate.policy)] or measured
    chosen = allowed[0]
    subject = next(s for s in subjects if s.model.variant == chosen.variant)
    unscheduled = [o for o in measured if o.candidate.policy == "sequential"]
    plain = next((o for o in unscheduled if o.variant == DEFAULT_VARIANT), unscheduled[0])
    return Decision(
        schedule=chosen.candidate.schedule,
        policy=chosen.candidate.policy,
        variant=chosen.variant,
        measured_us=chosen.measured_us or 0.0,
        sequential_us=plain.measured_us or 0.0,
        alternatives=tuple(_alternative(outcome) for outcome in outcomes),
        operators=subject.operators,
        refusals=subject.refusals,
    )


def _alternative(outcome: Outcome) -> Mapping[str, Any]:
    return {
        "policy": outcome.candidate.policy,
        "variant": str(outcome.variant),
        "streams": outcome.candidate.stream_count,
        "predicted_us": outcome.candidate.predicted_us,
        "tried_us": outcome.trial_us,
        "measured_us": outcome.measured_us,
        "samples_us": list(outcome.samples_us),
    }


def remember(cache: MeasurementCache, key: str, decision: Decision) -> None:
    """Keep a decision."""
    content = {
        "slots": [[slot.operator, slot.placement.stream] for slot in decision.schedule.slots],
        "policy": decision.policy,
        "variant": decision.variant.to_json(),
        "measured_us": decision.measured_us,
        "sequential_us": decision.sequential_us,
        "alternatives": list(decision.alternatives),
        "operators": dict(decision.operators),
        "refusals": dict(decision.refusals),
    }
    cache.write(key, content)


def recall(
    cache: MeasurementCache, key: str, graph: OperatorGraph, device: Device
) -> Decision | None:
    """The decision kept for `key`; None where there is none, or it does not fit the graph."""
    content = cache.read(key)
    try:
        slots = [Slot(int(o), Placement(device, int(stream))) for o, stream in content["slots"]]
        schedule = Schedule(tuple(slots))
        count = 1 + max(slot.placement.stream for slot in slots)
        check_schedule(graph, Machine((device,), count), schedule)
        return Decision(
            schedule=schedule,
            policy=str(content["policy"]),
            variant=Variant.from_json(content["variant"]),
            measured_us=float(content["measured_us"]),
            sequential_us=float(content["sequential_us"]),
            alternatives=tuple(content["alternatives"]),
            operators={n: (float(us), str(b)) for n, (us, b) in content["operators"].items()},
            refusals={str(name): str(why) for name, why in content["refusals"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError, ScheduleError):
        return None
