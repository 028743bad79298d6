"""From a model to a measured decision: try variants, profile, let policies propose, tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from onnxsched.annotate import portable_refusals
from onnxsched.checking import PlainRuns
from onnxsched.decision import Decision, decide
from onnxsched.loading import AS_LOADED, Form, Model, graph_from_model, with_refusals
from onnxsched.memory import fits_on_first
from onnxsched.outcomes import Subject
from onnxsched.profile import Profile
from onnxsched.profiling.cache import MeasurementCache
from onnxsched.profiling.measure import Progress, measure_profile
from onnxsched.profiling.sharing import Profiler
from onnxsched.profiling.transfers import Transfers, measure_transfers
from onnxsched.proposals import (
    Request,
    recomputed,
    subject_of_profile,
    subject_of_recomputation,
    unscheduled_subject,
)
from onnxsched.rewriting import (
    Rewrites,
    joined,
    possible_bands,
    possible_rewrites,
    rewritten,
    twice,
)
from onnxsched.tuning import tune
from onnxsched.variant_racing import promising, race_variants
from onnxsched.variants import lowered_model, possible_variants
from onnxsched_runtime.errors import DeviceError, OnnxschedError
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant

_RACE_SHARE, _RACE_SHARE_OF_SEVERAL = 0.4, 0.2
"""Of the budget, for variants and rewrites in one stream; the rest is for schedules, of which
there are more on several devices."""


def measured_decision(
    model: Model,
    cache: MeasurementCache,
    plain: PlainRuns,
    request: Request,
    worker: Profiler | None,
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

    def measured(lowered: Model) -> Profile:
        device, libraries = request.device, request.custom_ops
        return measure_profile(lowered, device, cache, libraries, progress, worker)

    transfers = measure_transfers(request.machine.devices, cache, progress)
    subjects = _subjects(model, measured, transfers, plain, request, progress)
    if worker is not None:  # all is profiled, and what follows is measured beside nothing else
        worker.close()
    if not any(subject.candidates for subject in subjects):
        raise _too_large(request)
    tuned = tune(
        subjects,
        request.machine,
        budget_s=(1 - _race_share(request)) * request.budget_s,
        is_refined=request.policy in ("auto", "search"),
        custom_ops=request.custom_ops,
        progress=progress,
    )
    return decide(tuned.outcomes, subjects, request.policy), tuned.is_complete


def _race_share(request: Request) -> float:
    return _RACE_SHARE if len(request.machine.devices) == 1 else _RACE_SHARE_OF_SEVERAL


def _subjects(
    model: Model,
    measured: Callable[[Model], Profile],
    transfers: Transfers,
    plain: PlainRuns,
    request: Request,
    progress: Progress,
) -> list[Subject]:
    """The variants and rewrites that are worth trying, with what policies propose for each.

    Args:
        model: As it was loaded.
        measured: Measures the operators of a model.
        transfers: What copies between devices cost.
        plain: What the model must compute.
        request: What is asked for.
        progress: Told what is being done.
    """
    model, default, profile = _profiled(model, measured, request)
    profiles: dict[Form, Profile] = {AS_LOADED: profile}

    def profile_of(lowered: Model) -> Profile:
        if lowered.form not in profiles:
            profiles[lowered.form] = measured(lowered)
        return profiles[lowered.form]

    raced = _raced(model, default, profile_of, plain, request, progress)
    raced += _in_bands(model, *raced[0], request, progress)
    subjects = []
    for number, (portable, lowered) in enumerate(raced):
        own = (
            profile_of(lowered) if lowered.form == AS_LOADED else _if_possible(profile_of, lowered)
        )
        if own is not None:
            progress("proposing schedules", number, len(raced))
            subjects.append(subject_of_profile(portable, lowered, own, transfers, request))
    if len(request.machine.devices) == 1:  # the first has most of the time for trials
        subjects.sort(key=_shortest_us)
    if request.is_split:
        subjects += _computed_twice(model, subjects, profile_of, request, progress)
    if not any(subject.model.form == AS_LOADED for subject in subjects):
        subjects.append(unscheduled_subject(model, default, request.machine))
    return subjects


def _shortest_us(subject: Subject) -> float:
    """The shortest time that is predicted of a subject's schedules."""
    return min((candidate.predicted_us for candidate in subject.candidates), default=math.inf)


def _profiled(
    model: Model, measured: Callable[[Model], Profile], request: Request
) -> tuple[Model, Model, Profile]:
    """Profile a model as ONNX Runtime lowers it by itself.

    Returns:
        The model with what turned out to refuse a capture, what it is lowered to, and the profile
        of that.
    """
    default = model
    if request.device.kind == "cuda":
        default = lowered_model(model, DEFAULT_VARIANT, request.device, request.custom_ops)
    profile = measured(default)
    if profile.refusals:  # what must stay on the host is not lowered
        model = with_refusals(model, portable_refusals(model, default, profile.refusals))
        profile = measured(model)
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

    def rewrites_of(variant: Variant) -> Rewrites:
        is_free = request.schedule is None
        return possible_rewrites(model, device, variant) if is_free else Rewrites()

    is_alone = len(variants) == 1 and rewrites_of(variants[0]) == Rewrites()
    fits = fits_on_first(graph_from_model(default), request.machine)
    if is_alone or not request.variants or not fits:
        return [(model, default)]
    raced = race_variants(
        model,
        device,
        variants,
        rewrites_of,
        plain,
        refusals_of=lambda lowered: profile_of(lowered).refusals,
        budget_s=_race_share(request) * request.budget_s,
        custom_ops=request.custom_ops,
        progress=progress,
    )
    return [
        (outcome.portable, default if outcome.model.form == AS_LOADED else outcome.model)
        for outcome in promising(raced)
    ]


def _in_bands(
    model: Model, best: Model, lowered: Model, request: Request, progress: Progress
) -> list[tuple[Model, Model]]:
    """The best form of a model in bands, which no race in one stream tells the worth of.

    Args:
        model: As it was loaded.
        best: What won the race, portable.
        lowered: What that is lowered to.
        request: What is asked for.
        progress: Told what is being done.

    Returns:
        Portable models, each with what it is lowered to.
    """
    if not request.is_split:
        return []
    names = possible_bands(best, len(request.machine.devices))
    found = []
    for number, name in enumerate(names):
        progress("cutting bands", number, len(names))
        portable = rewritten(model, joined(best.rewrite, name))
        executed = _lowered(portable, lowered.variant, request)
        if executed is not None:
            found.append((portable, executed))
    return found


def _computed_twice(
    model: Model,
    subjects: Sequence[Subject],
    profile_of: Callable[[Model], Profile],
    request: Request,
    progress: Progress,
) -> list[Subject]:
    """Forms of the model with operators computed twice, where the best schedule gains from it."""
    found = []
    for number, subject in enumerate(subjects):
        progress("duplicating operators", number, len(subjects))
        gain = recomputed(subject, request.machine)
        if gain is None:
            continue
        policy, recomputation = gain
        name = twice(subject.portable.rewrite)
        portable = rewritten(model, name, recomputation.duplicates)
        lowered = _lowered(portable, subject.model.variant, request)
        own = None if lowered is None else _if_possible(profile_of, lowered)
        if lowered is not None and own is not None:
            found.append(
                subject_of_recomputation(subject, portable, lowered, own, policy, recomputation)
            )
    return found


def _lowered(portable: Model, variant: Variant, request: Request) -> Model | None:
    """A model in another form than it was loaded in, as it is executed; None where that fails."""
    if request.device.kind == "cpu":
        return portable
    try:
        return lowered_model(portable, variant, request.device, request.custom_ops)
    except DeviceError:
        raise
    except OnnxschedError:
        return None


def _if_possible(profile_of: Callable[[Model], Profile], lowered: Model) -> Profile | None:
    """The profile of a form that the model can do without; None where an operator is refused."""
    try:
        found = profile_of(lowered)
    except DeviceError:
        raise
    except OnnxschedError:
        return None
    return None if found.refusals else found


def _too_large(request: Request) -> DeviceError:
    machine = request.machine
    rooms = ", ".join(f"{d} with {machine.room_nbytes(d)} bytes" for d in machine.devices)
    return DeviceError(
        f"No schedule of policy {request.policy} fits into the free memory of {rooms}; name more "
        "devices, bind smaller inputs (--shape), or try --policy auto."
    )
