"""From a model to a measured decision: try variants, profile, let policies propose, tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onnxsched.annotate import lowered_schedule, portable_refusals, portable_schedule
from onnxsched.calibration import TYPICAL
from onnxsched.candidates import Candidate, propose
from onnxsched.checking import PlainRuns
from onnxsched.contraction import (
    Contraction,
    contract_chains,
    contract_cost,
    expand,
    uncontracted,
)
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.decision import Decision, decide
from onnxsched.graph import OperatorGraph
from onnxsched.loading import AS_LOADED, Form, Model, graph_from_model, with_refusals
from onnxsched.machine import Machine
from onnxsched.memory import fits_on_first
from onnxsched.outcomes import Subject
from onnxsched.policies import POLICIES
from onnxsched.profile import Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.measure import Progress, measure_profile
from onnxsched.profiling.transfers import Transfers, measure_transfers
from onnxsched.rewriting import possible_bands, possible_rewrites, rewritten
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.seeding import band_schedule
from onnxsched.simulate import simulate
from onnxsched.tuning import tune
from onnxsched.variants import lowered_model, possible_variants, promising, race_variants
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ScheduleError
from onnxsched_runtime.lowering import origins
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for, checked."""

    policy: str
    """Its name, `auto`, or `file` for `schedule`."""
    machine: Machine
    """All devices, and the cap of streams on each. Models are profiled on the first."""
    budget_s: float
    variants: bool
    custom_ops: tuple[str, ...]
    split: bool = True
    """Cut operators on images into bands of rows, where there are several devices."""
    schedule: Schedule | None = None
    """Of the model as it was loaded: nothing else is proposed beside one stream."""

    @property
    def device(self) -> Device:
        """The first device."""
        return self.machine.devices[0]


def measured_decision(
    model: Model,
    cache: MeasurementCache,
    plain: PlainRuns,
    request: Request,
    progress: Progress,
) -> tuple[Decision, bool]:
    """Try variants and rewrites, let policies schedule the promising, measure what they propose.

    The model is profiled as it is before anything is captured here, and rewrites before they are:
    what ends the process when it is captured must end the profiler's.

    Returns:
        The decision, and whether it was come to without an interruption.

    Raises:
        DeviceError: Nothing that is proposed fits into the memory of the devices.
    """
    device, libraries = request.device, request.custom_ops
    transfers = measure_transfers(request.machine.devices, cache, progress)
    model, default, profile = _profiled(model, device, cache, libraries, progress)
    profiles: dict[Form, Profile] = {AS_LOADED: profile}

    def profile_of(lowered: Model) -> Profile:
        if lowered.form not in profiles:
            profiles[lowered.form] = measure_profile(lowered, device, cache, libraries, progress)
        return profiles[lowered.form]

    raced = _raced(model, default, profile_of, plain, request, progress)
    raced += _in_bands(model, raced[0][1].variant, request)
    subjects = []
    for portable, lowered in raced:
        own = profile_of(lowered)
        if lowered.form == AS_LOADED or not own.refusals:
            subjects.append(_subject(portable, lowered, own, transfers, request))
    if not any(subject.model.form == AS_LOADED for subject in subjects):
        subjects.append(_unscheduled(model, default, request.machine))
    if not any(subject.candidates for subject in subjects):
        raise _too_large(request)
    tuned = tune(
        subjects,
        request.machine,
        budget_s=request.budget_s / 2,
        is_refined=request.policy in ("auto", "search"),
        custom_ops=libraries,
        progress=progress,
    )
    return decide(tuned.outcomes, subjects, request.policy), tuned.is_complete


def _profiled(
    model: Model,
    device: Device,
    cache: MeasurementCache,
    custom_ops: tuple[str, ...],
    progress: Progress,
) -> tuple[Model, Model, Profile]:
    """Profile a model as ONNX Runtime lowers it by itself.

    Returns:
        The model with what turned out to refuse a capture, what it is lowered to, and the profile
        of that.
    """
    default = model
    if device.kind == "cuda":
        default = lowered_model(model, DEFAULT_VARIANT, device, custom_ops)
    profile = measure_profile(default, device, cache, custom_ops, progress)
    if profile.refusals:  # what must stay on the host is not lowered
        model = with_refusals(model, portable_refusals(model, default, profile.refusals))
        profile = measure_profile(model, device, cache, custom_ops, progress)
        model = default = with_refusals(model, profile.refusals)
    return model, default, profile


def _raced(
    model: Model,
    default: Model,
    profile_of: Callable[[Model], Profile],
    plain: PlainRuns,
    request: Request,
    progress: Progress,
) -> list[tuple[Model, Model]]:
    """What is worth scheduling: portable models, each with what it is lowered to.

    Of a model that the first device has no room for nothing can be raced there.

    Args:
        model: As it was loaded.
        default: What it is lowered to by default.
        profile_of: Measures the operators of a lowered model.
        plain: What it must compute.
        request: What is asked for.
        progress: Told what is being done.
    """
    device = request.device
    variants = possible_variants(model, device)
    rewrites = possible_rewrites(model, device) if request.schedule is None else ()
    is_alone = len(variants) == 1 and not rewrites
    fits = fits_on_first(graph_from_model(default), request.machine)
    if is_alone or not request.variants or not fits:
        return [(model, default)]
    raced = race_variants(
        model,
        device,
        variants,
        rewrites,
        plain,
        refusals_of=lambda lowered: profile_of(lowered).refusals,
        budget_s=request.budget_s / 2,
        custom_ops=request.custom_ops,
        progress=progress,
    )
    return [
        (outcome.portable, default if outcome.model.form == AS_LOADED else outcome.model)
        for outcome in promising(*raced)
    ]


def _in_bands(model: Model, variant: Variant, request: Request) -> list[tuple[Model, Model]]:
    """The model in bands, portable and lowered: no race in one stream would tell their worth."""
    if not (request.split and request.variants) or request.schedule is not None:
        return []
    found = []
    for name in possible_bands(model, len(request.machine.devices)):
        portable = lowered = rewritten(model, name)
        if request.device.kind == "cuda":
            lowered = lowered_model(portable, variant, request.device, request.custom_ops)
        found.append((portable, lowered))
    return found


def _subject(
    portable: Model,
    lowered: Model,
    profile: Profile,
    transfers: Transfers,
    request: Request,
) -> Subject:
    """Let policies schedule a variant, or take the schedule that is given."""
    graph = graph_from_model(lowered)
    cost = TableCost(
        tuple(profile.cost(operator.name) for operator in graph.operators),
        contention=TYPICAL if request.device.kind == "cuda" else Contention(),
        transfers=transfers,
    )
    contraction, candidates = _candidates(portable, lowered, graph, cost, request)
    return Subject(
        portable,
        lowered,
        contraction,
        cost,
        candidates,
        _solo_times(portable, lowered, profile),
        portable.host_reasons,
    )


def _candidates(
    portable: Model, lowered: Model, graph: OperatorGraph, cost: TableCost, request: Request
) -> tuple[Contraction, tuple[Candidate, ...]]:
    """What policies propose for the lowered operators; or one stream, and the schedule given."""
    machine, given = request.machine, request.schedule
    if given is not None:
        contraction = uncontracted(graph)
        proposed = propose(graph, contraction, cost, machine, ())
    else:
        policies = list(POLICIES) if request.policy == "auto" else [request.policy]
        for contraction in (contract_chains(graph), uncontracted(graph)):
            proposed = propose(graph, contraction, cost, machine, policies)
            proposed += _bands(graph, contraction, cost, machine)
            if proposed:  # else a chain may be too large for a device, but not its operators
                break
    found = [
        replace(c, schedule=portable_schedule(portable, lowered, c.schedule)) for c in proposed
    ]
    if given is not None:
        carried = lowered_schedule(portable, lowered, given)
        predicted_us = simulate(graph, cost, carried).makespan_us
        found.append(Candidate(request.policy, given, carried, predicted_us))
    return contraction, tuple(found)


def _bands(
    graph: OperatorGraph, contraction: Contraction, cost: TableCost, machine: Machine
) -> tuple[Candidate, ...]:
    """The schedule that gives each band of rows a device of its own, where there are bands."""
    chain_cost = contract_cost(contraction, cost)
    try:
        contracted = band_schedule(contraction.graph, chain_cost, machine)
        if contracted is None:
            return ()
        schedule = expand(contraction, contracted)
        check_schedule(graph, machine, schedule)
    except ScheduleError:  # no room
        return ()
    predicted_us = simulate(contraction.graph, chain_cost, contracted).makespan_us
    return (Candidate("bands", schedule, contracted, predicted_us),)


def _unscheduled(model: Model, default: Model, machine: Machine) -> Subject:
    """The model as ONNX Runtime runs it by itself: a candidate wherever one device holds it."""
    graph = graph_from_model(model)
    contraction = contract_chains(graph)
    cost = TableCost(tuple(OperatorCost(0.0) for _ in graph.operators))
    candidates = propose(graph, contraction, cost, machine, ["sequential"])
    return Subject(model, default, contraction, cost, candidates, {}, {})


def _solo_times(model: Model, variant: Model, profile: Profile) -> dict[str, tuple[float, str]]:
    """Solo time and bound of each node of the portable model, from those it became."""
    origin = origins(model.proto, variant.proto)
    times: dict[str, tuple[float, str]] = {}
    for name, operator in profile.operators.items():
        if name in origin:
            known_us = times.get(origin[name], (0.0, ""))[0]
            times[origin[name]] = (known_us + operator.duration_us, profile.bounds[name])
    return times


def _too_large(request: Request) -> DeviceError:
    machine = request.machine
    rooms = ", ".join(f"{d} with {machine.room_nbytes(d)} bytes" for d in machine.devices)
    return DeviceError(
        f"No schedule of policy {request.policy} fits into the free memory of {rooms}; name more "
        "devices, bind smaller inputs (--shape), or try --policy auto."
    )
