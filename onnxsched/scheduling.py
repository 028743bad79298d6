"""From a model to a measured decision: try variants, profile, let policies propose, tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxsched.annotate import portable_refusals, portable_schedule
from onnxsched.calibration import TYPICAL
from onnxsched.candidates import propose
from onnxsched.checking import PlainRuns
from onnxsched.contraction import contract_chains
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.decision import Decision, decide
from onnxsched.loading import Model, graph_from_model, with_refusals
from onnxsched.policies import POLICIES
from onnxsched.profile import Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.measure import Progress, measure_profile
from onnxsched.tuning import Subject, tune
from onnxsched.variants import lowered_model, possible_variants, promising, race_variants
from onnxsched_runtime.device import Device
from onnxsched_runtime.lowering import origins
from onnxsched_runtime.variant import DEFAULT_VARIANT


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for, checked."""

    policy: str
    streams: int
    """The cap."""
    budget_s: float
    variants: bool
    custom_ops: tuple[str, ...]


def measured_decision(
    model: Model,
    device: Device,
    cache: MeasurementCache,
    plain: PlainRuns,
    request: Request,
    progress: Progress,
) -> tuple[Decision, bool]:
    """Try variants, let policies schedule the promising ones, and measure what they propose.

    The model is profiled as it is before anything is captured here: what ends the process when it
    is captured must end the profiler's.

    Returns:
        The decision, and whether it was come to without an interruption.
    """
    libraries = request.custom_ops
    default = model
    if device.kind == "cuda":
        default = lowered_model(model, DEFAULT_VARIANT, device, libraries)
    profile = measure_profile(default, device, cache, libraries, progress)
    refusals: Mapping[str, str] = {}
    if profile.refusals:
        refusals = portable_refusals(model, default, profile.refusals)
        default = lowered_model(with_refusals(model, refusals), DEFAULT_VARIANT, device, libraries)
        profile = measure_profile(default, device, cache, libraries, progress)
        refusals = {**refusals, **profile.refusals}
        default = with_refusals(default, refusals)
    model = with_refusals(model, refusals)
    wanted = possible_variants(model, device)
    variants = [default]
    if request.variants and len(wanted) > 1:
        raced = race_variants(
            model,
            device,
            wanted,
            plain,
            budget_s=request.budget_s / 4,
            custom_ops=libraries,
            progress=progress,
        )
        variants = [
            default if outcome.model.variant == DEFAULT_VARIANT else outcome.model
            for outcome in promising(raced)
        ]
    subjects = []
    for variant in variants:
        own = profile
        if variant.variant != DEFAULT_VARIANT:
            own = measure_profile(variant, device, cache, libraries, progress)
            if own.refusals:
                continue
        subjects.append(_subject(model, variant, own, device, request, refusals))
    if not any(s.model.variant == DEFAULT_VARIANT for s in subjects):
        subjects.append(_unscheduled(model, default, device))
    tuned = tune(
        model,
        subjects,
        device,
        stream_count=request.streams,
        budget_s=request.budget_s / 2,
        is_refined=request.policy in ("auto", "search"),
        custom_ops=libraries,
        progress=progress,
    )
    return decide(tuned.outcomes, subjects, request.policy), tuned.is_complete


def _subject(
    model: Model,
    variant: Model,
    profile: Profile,
    device: Device,
    request: Request,
    refusals: Mapping[str, str],
) -> Subject:
    """Let policies schedule a variant."""
    graph = graph_from_model(variant)
    contraction = contract_chains(graph)
    cost = TableCost(
        tuple(profile.cost(operator.name) for operator in graph.operators),
        contention=TYPICAL if device.kind == "cuda" else Contention(),
    )
    policies = list(POLICIES) if request.policy == "auto" else [request.policy]
    proposed = propose(graph, contraction, cost, device, policies, request.streams)
    candidates = tuple(
        replace(c, schedule=portable_schedule(model, variant, c.schedule)) for c in proposed
    )
    return Subject(
        variant,
        contraction,
        cost,
        candidates,
        _solo_times(model, variant, profile),
        refusals,
    )


def _unscheduled(model: Model, default: Model, device: Device) -> Subject:
    """The model as ONNX Runtime runs it by itself: always a candidate."""
    graph = graph_from_model(model)
    contraction = contract_chains(graph)
    cost = TableCost(tuple(OperatorCost(0.0) for _ in graph.operators))
    candidates = propose(graph, contraction, cost, device, ["sequential"], 1)
    return Subject(default, contraction, cost, candidates, {}, {})


def _solo_times(model: Model, variant: Model, profile: Profile) -> dict[str, tuple[float, str]]:
    """Solo time and bound of each node of the portable model, from those it became."""
    origin = origins(model.proto, variant.proto)
    times: dict[str, tuple[float, str]] = {}
    for name, operator in profile.operators.items():
        if name in origin:
            known_us = times.get(origin[name], (0.0, ""))[0]
            times[origin[name]] = (known_us + operator.duration_us, profile.bounds[name])
    return times
