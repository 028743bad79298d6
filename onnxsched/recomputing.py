"""Operators that had better be computed twice than have their results copied between devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from onnxsched.cost import Contention, CostModel, OperatorCost
from onnxsched.graph import RANDOM_TYPES, Edge, OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, simulate
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.naming import unused_name

WORK_LIMIT = 800_000
"""Operators and edges that are simulated in all to find what to copy: some seconds, however large
the graph. Graphs of a few hundred operators never need as many."""
_DRAWING_TYPES = RANDOM_TYPES | {"Dropout"}
"""What may write something else each time."""
_ROUNDING_US = 1e-6


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An operator that is computed once more; operators are given by name."""

    operator: str
    copy: str
    """The name of the second one."""
    consumers: tuple[str, ...]
    """Those that read from the copy then, all on one device."""


@dataclass(frozen=True, slots=True)
class RepeatedCost:
    """The costs of a graph some of whose operators are there more than once."""

    original: CostModel
    sources: tuple[int, ...]
    """For each operator its index in the original graph."""

    @property
    def contention(self) -> Contention:
        """As in the original."""
        return self.original.contention

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """What the operator costs of which this one is, or is a copy."""
        return self.original.operator(self.sources[operator], device)

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """As in the original."""
        return self.original.transfer_us(nbytes, source, target)


@dataclass(frozen=True)
class Recomputation:
    """A schedule with operators that are computed twice, and the graph it is a schedule of."""

    graph: OperatorGraph
    cost: RepeatedCost
    schedule: Schedule
    duplicates: tuple[Duplicate, ...] = ()
    """In the order in which they were made: a later one may read from an earlier one."""


def recompute(
    graph: OperatorGraph, cost: CostModel, machine: Machine, schedule: Schedule
) -> Recomputation:
    """Compute operators once more where their results are needed, if that is simulated shorter.

    Task duplication (Kruatrachue & Lewis, IEEE Software 1988) on a finished schedule: from the
    last operator to the first, an operator that others on another device wait for gets a copy
    there if that has its result sooner than a transfer brings it, and is kept if the makespan gets
    shorter; so it never gets longer. Only operators with one result that the caller or others
    still read are copied, none on the host, none that draws random numbers. Where there are more
    than `WORK_LIMIT` lets be simulated, those that look best are. O(`WORK_LIMIT`), but for the
    logarithm in a simulation, and O(n * (log n + devices) + edges) for the first look.

    Args:
        graph: The operators, not contracted.
        cost: Their costs.
        machine: What the schedule keeps to, memory included.
        schedule: A schedule that passes `check_schedule`.
    """
    state = _State.of(Recomputation(graph, RepeatedCost(cost, tuple(range(len(graph)))), schedule))
    tries = WORK_LIMIT // max(1, len(graph) + len(graph.edges))
    least_us = _least_gain_us(state, machine, tries)
    for operator in reversed(range(len(graph))):
        for device in machine.devices:
            gain_us = _gain_us(state, operator, device)
            if gain_us is None or gain_us < least_us:
                continue
            if not tries:
                return state.found
            tries -= 1
            tried = with_duplicate(state.found, _duplicate(state.found, operator, device))
            order = [slot.operator for slot in tried.schedule.slots]
            if too_full(tried.graph, machine, order, tried.schedule.placement_of):
                continue
            tried_state = _State.of(tried)
            if tried_state.timeline.makespan_us < state.timeline.makespan_us:
                state = tried_state
                operator += 1  # Its copy comes before it.
    return state.found


def with_duplicate(before: Recomputation, duplicate: Duplicate) -> Recomputation:
    """The same with one more copy: it comes before its original.

    It is launched before the first of its readers, on the same stream. O(n + edges).
    """
    graph = before.graph
    names = [operator.name for operator in graph.operators]
    copy = names.index(duplicate.operator)
    original = graph.operators[copy]
    moved = set(duplicate.consumers)

    def edges() -> Iterator[Edge]:
        for edge in graph.edges:
            if edge.consumer <= copy:  # As it was; the copy reads what the original did.
                yield edge
            if edge.consumer >= copy:
                producer, tensor = edge.producer + (edge.producer >= copy), edge.tensor
                if edge.producer == copy and names[edge.consumer] in moved:
                    producer, tensor = copy, f"{duplicate.copy}/{edge.tensor}"
                yield Edge(producer, edge.consumer + 1, tensor, edge.nbytes)

    again = replace(original, name=duplicate.copy, kept_nbytes=0)
    operators = (*graph.operators[:copy], again, *graph.operators[copy:])
    sources = before.cost.sources
    slots = [
        slot if slot.operator < copy else Slot(slot.operator + 1, slot.placement)
        for slot in before.schedule.slots
    ]
    first = min(v for v, slot in enumerate(before.schedule.slots) if names[slot.operator] in moved)
    slots.insert(first, Slot(copy, slots[first].placement))
    return Recomputation(
        OperatorGraph(operators, tuple(sorted(edges(), key=lambda edge: edge.consumer))),
        replace(before.cost, sources=(*sources[:copy], sources[copy], *sources[copy:])),
        Schedule(tuple(slots)),
        (*before.duplicates, duplicate),
    )


@dataclass(frozen=True)
class _State:
    """What was found, and when it is simulated to run."""

    found: Recomputation
    timeline: Timeline

    @classmethod
    def of(cls, found: Recomputation) -> _State:
        return cls(found, simulate(found.graph, found.cost, found.schedule))

    @cached_property
    def slacks_us(self) -> list[float]:
        """How much later each operator could start before the last one finishes later.

        But for what operators and transfers cost each other. O(n + edges).
        """
        cost, placement_of = self.found.cost, self.found.schedule.placement_of
        ways_us = [0.0] * len(self.found.graph)
        next_us: dict[Placement, float] = {}
        for slot in reversed(self.found.schedule.slots):
            own = slot.placement
            rest_us = next_us.get(own, 0.0)
            for edge in self.found.graph.outgoing[slot.operator]:
                reader = placement_of[edge.consumer]
                delay_us = cost.transfer_us(edge.nbytes, own.device, reader.device)
                delay_us += cost.contention.event_us if reader != own else 0.0
                rest_us = max(rest_us, delay_us + ways_us[edge.consumer])
            start_us = self.timeline.starts_us[slot.operator]
            way_us = self.timeline.finishes_us[slot.operator] - start_us + rest_us
            ways_us[slot.operator] = next_us[own] = cost.contention.start_us + way_us
        last_us = self.timeline.makespan_us + cost.contention.start_us
        pairs = zip(self.timeline.starts_us, ways_us, strict=True)
        return [last_us - start_us - way_us for start_us, way_us in pairs]


def _least_gain_us(state: _State, machine: Machine, count: int) -> float:
    """The gain that only `count` copies seem to bring; -inf if there are no more. O(n log n)."""
    gains_us = [
        gain_us
        for operator in range(len(state.found.graph))
        for device in machine.devices
        if (gain_us := _gain_us(state, operator, device)) is not None
    ]
    return sorted(gains_us, reverse=True)[count - 1] if 0 < count < len(gains_us) else -inf


def _gain_us(state: _State, operator: int, device: Device) -> float | None:
    """How much sooner all may finish with a copy there; None where it is not worth a thought.

    It is where the operator is on another device, is waited for here, and a copy has the result
    sooner than a transfer.
    """
    found, timeline = state.found, state.timeline
    graph, cost, placement_of = found.graph, found.cost, found.schedule.placement_of
    home, node = placement_of[operator].device, graph.operators[operator]
    edges = graph.outgoing[operator]
    here = _readers(found, operator, device)
    is_alone = len({edge.tensor for edge in edges}) == 1
    is_still_read = node.kept_nbytes > 0 or any(edge.consumer not in here for edge in edges)
    if home == device or not here or not is_alone or not is_still_read:
        return None
    if any(graph.operators[v].host_reason for v in (operator, *here)):
        return None
    if node.op_type in _DRAWING_TYPES:
        return None
    inputs_us = [
        timeline.finishes_us[edge.producer]
        + cost.transfer_us(edge.nbytes, placement_of[edge.producer].device, device)
        for edge in graph.incoming[operator]
    ]
    inputs_us += [cost.transfer_us(w.nbytes, home, device) for w in node.weights if w.is_input]
    copy_us = max(inputs_us, default=0.0) + cost.operator(operator, device).duration_us
    arrival_us = timeline.finishes_us[operator] + cost.transfer_us(edges[0].nbytes, home, device)
    overhead_us = cost.contention.event_us + cost.contention.start_us
    first_us = min(timeline.starts_us[v] for v in here)
    if copy_us >= arrival_us or first_us > arrival_us + overhead_us + _ROUNDING_US:
        return None
    return arrival_us - copy_us - min(state.slacks_us[v] for v in here)


def _readers(found: Recomputation, operator: int, device: Device) -> set[int]:
    """Those on a device that read from an operator."""
    placement_of = found.schedule.placement_of
    edges = found.graph.outgoing[operator]
    return {e.consumer for e in edges if placement_of[e.consumer].device == device}


def _duplicate(found: Recomputation, operator: int, device: Device) -> Duplicate:
    """A copy of an operator for all that read from it on a device. O(n)."""
    names = [other.name for other in found.graph.operators]
    copy = unused_name(f"{names[operator]}/copy", set(names))
    consumers = tuple(names[v] for v in sorted(_readers(found, operator, device)))
    return Duplicate(names[operator], copy, consumers)
