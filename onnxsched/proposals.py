"""From the profile of a model to the schedules that policies propose for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnxsched.annotate import lowered_schedule, portable_schedule
from onnxsched.calibration import TYPICAL
from onnxsched.candidates import Candidate, propose
from onnxsched.contraction import (
    Contraction,
    contract_chains,
    contract_cost,
    expand,
    uncontracted,
)
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.loading import Model, graph_from_model
from onnxsched.machine import Machine
from onnxsched.outcomes import Subject
from onnxsched.policies import POLICIES
from onnxsched.profile import Profile
from onnxsched.profiling.transfers import Transfers
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.seeding import band_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ScheduleError
from onnxsched_runtime.lowering import origins


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


def subject_of_profile(
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


def unscheduled_subject(model: Model, default: Model, machine: Machine) -> Subject:
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
