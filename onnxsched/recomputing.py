"""Operators that had better be computed twice than have their results copied between devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnxsched.cost import Contention, CostModel, OperatorCost
from onnxsched.graph import RANDOM_TYPES, Edge, OperatorGraph
from onnxsched.machine import Machine
from onnxsched.memory import too_full
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import Timeline, simulate
from onnxsched_runtime.device import Device
from onnxsched_runtime.naming import unused_name

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
    still read are copied, none on the host, none that draws random numbers. O(candidates *
    simulation).

    Args:
        graph: The operators, not contracted.
        cost: Their costs.
        machine: What the schedule keeps to, memory included.
        schedule: A schedule that passes `check_schedule`.
    """
    found = Recomputation(graph, RepeatedCost(cost, tuple(range(len(graph)))), schedule)
    timeline = simulate(graph, cost, schedule)
    for operator in reversed(range(len(graph))):
        for device in machine.devices:
            duplicate = _promising(found, timeline, operator, device)
            if duplicate is None:
                continue
            tried = with_duplicate(found, duplicate)
            order = [slot.operator for slot in tried.schedule.slots]
            if too_full(tried.graph, machine, order, tried.schedule.placement_of):
                continue
            tried_timeline = simulate(tried.graph, tried.cost, tried.schedule)
            if tried_timeline.makespan_us < timeline.makespan_us:
                found, timeline = tried, tried_timeline
                operator += 1  # Its copy comes before it.
    return found


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
            producer, consumer = (v + (v >= copy) for v in (edge.producer, edge.consumer))
            shifted = replace(edge, producer=producer, consumer=consumer)
            if edge.consumer == copy:
                yield replace(shifted, consumer=copy)
            if edge.producer == copy and names[edge.consumer] in moved:
                shifted = replace(shifted, producer=copy, tensor=f"{duplicate.copy}/{edge.tensor}")
            yield shifted

    again = replace(original, name=duplicate.copy, kept_nbytes=0)
    operators = (*graph.operators[:copy], again, *graph.operators[copy:])
    sources = before.cost.sources
    slots = [replace(s, operator=s.operator + (s.operator >= copy)) for s in before.schedule.slots]
    first = min(v for v, slot in enumerate(before.schedule.slots) if names[slot.operator] in moved)
    slots.insert(first, Slot(copy, slots[first].placement))
    return Recomputation(
        OperatorGraph(operators, tuple(sorted(edges(), key=lambda edge: edge.consumer))),
        replace(before.cost, sources=(*sources[:copy], sources[copy], *sources[copy:])),
        Schedule(tuple(slots)),
        (*before.duplicates, duplicate),
    )


def _promising(
    found: Recomputation, timeline: Timeline, operator: int, device: Device
) -> Duplicate | None:
    """A copy on another device, waited for there, that has the result sooner than a transfer."""
    graph, cost, placement_of = found.graph, found.cost, found.schedule.placement_of
    home, node = placement_of[operator].device, graph.operators[operator]
    edges = graph.outgoing[operator]
    here = {e.consumer for e in edges if placement_of[e.consumer].device == device}
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
    names = {other.name for other in graph.operators}
    consumers = tuple(graph.operators[v].name for v in sorted(here))
    return Duplicate(node.name, unused_name(f"{node.name}/copy", names), consumers)
