"""From the profile of a model to the schedules that policies propose for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnxsched.annotate import lowered_schedule, portable_schedule
from onnxsched.calibration import TYPICAL
from onnxsched.candidates import Candidate, checked, propose
from onnxsched.contraction import (
    ContractedCost,
    Contraction,
    contract_chains,
    contract_cost,
    settled,
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
from onnxsched.recomputing import Recomputation, recompute
from onnxsched.schedule import Schedule
from onnxsched.seeding import band_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import RoomError
from onnxsched_runtime.lowering import origins

_LEAST_GAIN = 0.03
"""Of a simulated makespan, by computing operators twice: less is not worth a trial."""


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
    """Where there are several devices: cut operators on images into bands of rows, and compute
    operators twice."""
    schedule: Schedule | None = None
    """Of the model as it was loaded: nothing else is proposed beside one stream."""

    @property
    def device(self) -> Device:
        """The first device."""
        return self.machine.devices[0]

    @property
    def is_split(self) -> bool:
        """Whether more operators than were loaded may be made for several devices."""
        is_asked = self.split and self.variants and self.schedule is None
        return is_asked and len(self.machine.devices) > 1


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


def recomputed(subject: Subject, machine: Machine) -> tuple[str, Recomputation] | None:
    """What the best schedule over several devices had better compute twice, and its policy.

    None where there is no such schedule, or its simulated makespan gets hardly shorter. Operators
    are those of the portable model: each costs what all that it was lowered to does.
    """
    spread = [c for c in subject.candidates if len(c.schedule.devices) > 1]
    if not spread:
        return None
    best = min(spread, key=lambda candidate: candidate.predicted_us)
    graph, cost = graph_from_model(subject.portable), _portable_cost(subject)
    found = recompute(graph, cost, machine, best.schedule)
    before_us = simulate(graph, cost, best.schedule).makespan_us
    after_us = simulate(found.graph, found.cost, found.schedule).makespan_us
    is_shorter = after_us <= (1 - _LEAST_GAIN) * before_us and found.duplicates
    return (best.policy, found) if is_shorter else None


def subject_of_recomputation(
    before: Subject,
    portable: Model,
    lowered: Model,
    profile: Profile,
    policy: str,
    found: Recomputation,
) -> Subject:
    """A model that computes operators twice, with the one schedule that this was found for.

    Args:
        before: What it was found in.
        portable: The model with the copies.
        lowered: The same lowered.
        profile: Of that.
        policy: Whose schedule it was.
        found: The copies.
    """
    graph = graph_from_model(lowered)
    costs = tuple(profile.cost(operator.name) for operator in graph.operators)
    cost = replace(before.cost, operators=costs)
    return Subject(
        portable,
        lowered,
        uncontracted(graph),
        cost,
        (_obeyed(portable, lowered, graph, cost, policy, found.schedule),),
        _solo_times(portable, lowered, profile),
        portable.host_reasons,
        found.duplicates,
    )


def _portable_cost(subject: Subject) -> TableCost:
    """The costs of the portable model's operators; nothing for one that was fused away."""
    if subject.portable.proto is subject.model.proto:
        return subject.cost
    origin = origins(subject.portable.proto, subject.model.proto)
    parts: dict[str, list[int]] = {}
    for operator, node in enumerate(subject.model.proto.graph.node):
        if node.name in origin:
            parts.setdefault(origin[node.name], []).append(operator)
    sums = ContractedCost(tuple(map(tuple, parts.values())), subject.cost)
    device = Device("cpu")  # Any: the table knows of none.
    known = {name: sums.operator(number, device) for number, name in enumerate(parts)}
    nodes = subject.portable.proto.graph.node
    costs = tuple(known.get(node.name, OperatorCost(0.0)) for node in nodes)
    return replace(subject.cost, operators=costs)


def _obeyed(
    portable: Model,
    lowered: Model,
    graph: OperatorGraph,
    cost: TableCost,
    policy: str,
    schedule: Schedule,
) -> Candidate:
    """A schedule of the portable model as a candidate."""
    carried = lowered_schedule(portable, lowered, schedule)
    return Candidate(policy, schedule, carried, simulate(graph, cost, carried).makespan_us)


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
        chains = contract_chains(graph, with_inputs=len(machine.devices) > 1)
        for contraction in (chains, uncontracted(graph)):
            proposed = propose(graph, contraction, cost, machine, policies)
            proposed += _bands(graph, contraction, cost, machine)
            if proposed:  # else a chain may be too large for a device, but not its operators
                break
    found = [
        replace(c, schedule=portable_schedule(portable, lowered, c.schedule)) for c in proposed
    ]
    if given is not None:
        found.append(_obeyed(portable, lowered, graph, cost, request.policy, given))
    return contraction, tuple(found)


def _bands(
    graph: OperatorGraph, contraction: Contraction, cost: TableCost, machine: Machine
) -> tuple[Candidate, ...]:
    """The schedule that gives each band a device of its own, where there are bands and room."""
    chain_cost = contract_cost(contraction, cost)
    try:
        made = band_schedule(contraction.graph, chain_cost, machine)
        if made is None:
            return ()
        contracted = settled(contraction, made)
        return (checked(graph, contraction, chain_cost, machine, "bands", contracted),)
    except RoomError:
        return ()


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
