"""The schedules worth measuring: what the policies propose for several stream counts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onnxsched.contraction import Contraction, contract_cost, expand, settled
from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES, SPREADING
from onnxsched.policies.ios import GROUP_COUNT
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.errors import RoomError

STREAM_COUNTS = (2, 3, 4, 6, 8, 12, 16, 32)
"""Tried up to the cap: more is not better, and which count is best depends on the model."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that a policy proposes."""

    policy: str
    schedule: Schedule
    """Of the operators."""
    contracted: Schedule
    """Of the chains that the policy saw."""
    predicted_us: float

    @property
    def stream_count(self) -> int:
        """Streams it uses."""
        return self.schedule.stream_count


def propose(
    graph: OperatorGraph,
    contraction: Contraction,
    cost: CostModel,
    machine: Machine,
    policies: Sequence[str],
) -> tuple[Candidate, ...]:
    """Let policies schedule the graph for every stream count up to the cap.

    First on one device alone, sequential before all others; then, by the policies that use
    several, on all of them. The one is the first, or that with the most memory where the first has
    no room for one stream. Of equal schedules only the first is kept. Every schedule has passed
    `check_schedule`; what does not fit into the devices' memory is left out.

    Args:
        graph: The operators.
        contraction: Its chains, which the policies schedule.
        cost: Costs of the operators.
        machine: Where they run; its streams are the cap.
        policies: Names in `POLICIES`.
    """
    chain_cost = contract_cost(contraction, cost)
    found: dict[bytes, Candidate] = {}

    def ask(questions: Iterable[tuple[str, Machine]]) -> None:
        for policy, tried in questions:
            try:
                made = POLICIES[policy](contraction.graph, chain_cost, tried)
                contracted = settled(contraction, made)
                if contracted.shape not in found:
                    candidate = checked(graph, contraction, chain_cost, tried, policy, contracted)
                    found[contracted.shape] = candidate
            except RoomError:
                continue

    first = replace(machine, devices=machine.devices[:1])
    ask(_questions_alone(first, policies))
    if first != machine.alone and "sequential" not in {c.policy for c in found.values()}:
        ask(_questions_alone(machine.alone, policies))
    ask(_questions_together(machine, policies))
    return tuple(found.values())


def checked(
    graph: OperatorGraph,
    contraction: Contraction,
    chain_cost: CostModel,
    machine: Machine,
    policy: str,
    contracted: Schedule,
) -> Candidate:
    """A policy's schedule of chains as one of operators that `check_schedule` has passed.

    Raises:
        RoomError: It does not fit into the devices' memory.
    """
    schedule = expand(contraction, contracted)
    check_schedule(graph, machine, schedule)
    predicted_us = simulate(contraction.graph, chain_cost, contracted).makespan_us
    return Candidate(policy, schedule, contracted, predicted_us)


def _questions_alone(alone: Machine, policies: Sequence[str]) -> Iterator[tuple[str, Machine]]:
    """Which policies are asked for how much of a machine of one device."""
    yield "sequential", replace(alone, stream_count=1)
    for policy in policies:
        if policy == "hios-mr" and "hios-lp" in policies:
            continue  # Without devices to map to they are the same.
        for count in _stream_counts(policy, alone.stream_count):
            yield policy, replace(alone, stream_count=count)


def _questions_together(
    machine: Machine, policies: Sequence[str]
) -> Iterator[tuple[str, Machine]]:
    """Which policies are asked for how much of a machine of several devices."""
    if len(machine.devices) == 1:
        return
    for policy in policies:
        if policy in SPREADING:
            for count in sorted({1, *_stream_counts(policy, machine.stream_count)}):
                yield policy, replace(machine, stream_count=count)


def _stream_counts(policy: str, max_streams: int) -> list[int]:
    """The stream counts that a policy is asked for: those that it may answer differently."""
    if policy == "sequential":
        return []
    if policy in ("search", "hios-lp", "hios-mr"):  # which give up streams that gain nothing
        return [max_streams]
    if policy == "ios":  # which has at most so many groups side by side
        max_streams = min(max_streams, GROUP_COUNT)
    return sorted({count for count in STREAM_COUNTS if count < max_streams} | {max_streams})
