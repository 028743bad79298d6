"""The decision that tuning came to, and its place in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxsched.environment import device_name
from onnxsched.graph import OperatorGraph
from onnxsched.loading import AS_LOADED, Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.memory import fits_anyhow
from onnxsched.outcomes import Outcome, Subject, subject_of
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.signature import OperatorSignatures
from onnxsched.proposals import Request
from onnxsched.recomputing import Duplicate
from onnxsched.schedule import Schedule, Slot, check_schedule
from onnxsched_runtime.annotation import fingerprint
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import ScheduleError
from onnxsched_runtime.kernels import Kernels, kernels_from_json, kernels_to_json
from onnxsched_runtime.variant import Variant


@dataclass(frozen=True)
class Decision:
    """The schedule that was chosen, and what was measured on the way."""

    schedule: Schedule
    policy: str
    variant: Variant
    rewrite: str
    """What was made of the model before it was scheduled; a name that `rewritten` knows."""
    duplicates: tuple[Duplicate, ...]
    """What it computes twice, where the rewrite is of that kind."""
    measured_us: float
    sequential_us: float | None
    """The model as it was loaded as one session of the default variant, in the same rounds; None
    where no device alone has the memory."""
    alternatives: tuple[Mapping[str, Any], ...]
    """Every candidate: policy, variant, rewrite, streams, predicted, tried and measured times."""
    operators: Mapping[str, tuple[float, str]]
    """Median solo time in microseconds and bound, by node name."""
    refusals: Mapping[str, str]
    """Why a node can't be captured, for those where the attempt failed."""
    kernels: Kernels = field(default_factory=dict)
    """The fastest kernels of its convolutions and pools."""


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
    subject = subject_of(chosen, subjects)
    unscheduled = [o for o in measured if o.candidate.policy == "sequential"]
    unscheduled.sort(key=lambda outcome: outcome.form != AS_LOADED)
    variant, rewrite = chosen.form
    return Decision(
        schedule=chosen.candidate.schedule,
        policy=chosen.candidate.policy,
        variant=variant,
        rewrite=rewrite,
        duplicates=subject.duplicates,
        measured_us=chosen.measured_us or 0.0,
        sequential_us=unscheduled[0].measured_us if unscheduled else None,
        alternatives=tuple(_alternative(outcome) for outcome in outcomes),
        operators=subject.operators,
        refusals=subject.refusals,
        kernels=subject.model.kernels,
    )


def _alternative(outcome: Outcome) -> Mapping[str, Any]:
    variant, rewrite = outcome.form
    return {
        "policy": outcome.candidate.policy,
        "variant": str(variant),
        "rewrite": rewrite,
        "streams": outcome.candidate.stream_count,
        "devices": [str(device) for device in outcome.candidate.schedule.devices],
        "predicted_us": outcome.candidate.predicted_us,
        "tried_us": outcome.trial_us,
        "measured_us": outcome.measured_us,
        "samples_us": list(outcome.samples_us),
    }


def decision_key(model: Model, request: Request) -> str:
    """What a decision is kept for: equal where the same is asked of the same model.

    And where memory left about as much choice: what was found while a device was almost full may
    be slow once it is empty. What no device lacks memory for does not depend on it.
    """
    signatures = OperatorSignatures(model, request.custom_ops)
    operators = {node.name: signatures.of(node) for node in model.proto.graph.node}
    devices, streams = request.machine.devices, request.machine.stream_count
    asked: list[Any] = [request.policy, streams, request.budget_s, request.variants]
    if len(devices) > 1:  # one is as good as another of its kind, but pairs have their own links
        asked += [request.split, *([str(device), device_name(device)] for device in devices)]
    graph = graph_from_model(model)
    if not fits_anyhow(graph, request.machine):
        shares = [request.machine.room_nbytes(device) / graph.total_nbytes for device in devices]
        asked.append(["quarters", *(int(4 * min(1.0, share)) for share in shares)])
    if request.schedule is not None:
        asked += [[slot.operator, str(slot.placement)] for slot in request.schedule.slots]
    asked += [
        [name, hashlib.sha256(_content(array)).hexdigest()]
        for name, array in sorted(model.given.items())
    ]
    parts = ["decision", fingerprint(model.proto), operators, *asked]
    return json.dumps(parts, sort_keys=True)


def _content(array: np.ndarray) -> bytes:
    """What an array holds; the bytes of strings are only where they lie."""
    return repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes()


def remember(
    cache: MeasurementCache, key: str, decision: Decision, devices: Sequence[Device]
) -> None:
    """Keep a decision for `devices`, which it refers to by their numbers."""
    content = {
        "slots": [
            [slot.operator, devices.index(slot.placement.device), slot.placement.stream]
            for slot in decision.schedule.slots
        ],
        "policy": decision.policy,
        "variant": decision.variant.to_json(),
        "rewrite": decision.rewrite,
        "duplicates": [[d.operator, d.copy, list(d.consumers)] for d in decision.duplicates],
        "measured_us": decision.measured_us,
        "sequential_us": decision.sequential_us,
        "alternatives": list(decision.alternatives),
        "operators": dict(decision.operators),
        "refusals": dict(decision.refusals),
        "kernels": kernels_to_json(decision.kernels),
    }
    cache.write(key, content)


def recall(
    cache: MeasurementCache,
    key: str,
    graph_of: Callable[[str, Sequence[Duplicate]], OperatorGraph],
    machine: Machine,
) -> Decision | None:
    """The decision kept for `key`; None where there is none, or it does not fit any more.

    Args:
        cache: Where it is kept.
        key: What it was kept for.
        graph_of: The operators as a rewrite leaves them, by its name and what it computes twice;
            KeyError for a stranger.
        machine: Where it is to run; it may use more streams.
    """
    content = cache.read(key)
    try:
        rewrite = str(content["rewrite"])
        duplicates = tuple(
            Duplicate(str(operator), str(copy), tuple(map(str, consumers)))
            for operator, copy, consumers in content["duplicates"]
        )
        placed = [(int(o), int(device), int(stream)) for o, device, stream in content["slots"]]
        numbered = dict(enumerate(machine.devices))
        schedule = Schedule(
            tuple(Slot(o, Placement(numbered[device], s)) for o, device, s in placed)
        )
        count = 1 + max(stream for _, _, stream in placed)
        graph = graph_of(rewrite, duplicates)
        check_schedule(graph, replace(machine, stream_count=count), schedule)
        sequential_us = content["sequential_us"]
        return Decision(
            schedule=schedule,
            policy=str(content["policy"]),
            variant=Variant.from_json(content["variant"]),
            rewrite=rewrite,
            duplicates=duplicates,
            measured_us=float(content["measured_us"]),
            sequential_us=None if sequential_us is None else float(sequential_us),
            alternatives=tuple(content["alternatives"]),
            operators={n: (float(us), str(b)) for n, (us, b) in content["operators"].items()},
            refusals={str(name): str(why) for name, why in content["refusals"].items()},
            kernels=kernels_from_json(content["kernels"]),
        )
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, ScheduleError):
        return None
