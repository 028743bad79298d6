"""The schedules worth measuring: what the policies propose for several stream counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxsched.contraction import Contraction, contract_cost, expand
from onnxsched.cost import CostModel
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.policies.ios import GROUP_COUNT
from onnxsched.schedule import Schedule, check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device

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

    @property
    def label(self) -> str:
        """Policy and streams, e.g. `heft/4`."""
        return f"{self.policy}/{self.stream_count}"


def propose(
    graph: OperatorGraph,
    contraction: Contraction,
    cost: CostModel,
    device: Device,
    policies: Sequence[str],
    max_streams: int,
) -> tuple[Candidate, ...]:
    """Let policies schedule the graph for every stream count up to the cap.

    Sequential comes first; of equal schedules only the first is kept. Every schedule has
    passed `check_schedule`.

    Args:
        graph: The operators.
        contraction: Its chains, which the policies schedule.
        cost: Costs of the operators.
        device: Where they run.
        policies: Names in `POLICIES`.
        max_streams: The cap.
    """
    chain_cost = contract_cost(contraction, cost)
    found: dict[bytes, Candidate] = {}
    tried = [("sequential", 1)]
    for policy in policies:
        if policy == "hios-mr" and "hios-lp" in policies:
            continue  # Without devices to map to they are the same.
        tried += [(policy, count) for count in _stream_counts(policy, max_streams)]
    for policy, count in tried:
        machine = Machine((device,), count)
        contracted = POLICIES[policy](contraction.graph, chain_cost, machine)
        shape = contracted.shape
        if shape in found:
            continue
        schedule = expand(contraction, contracted)
        check_schedule(graph, machine, schedule)
        predicted_us = simulate(contraction.graph, chain_cost, contracted).makespan_us
        found[shape] = Candidate(policy, schedule, contracted, predicted_us)
    return tuple(found.values())


def _stream_counts(policy: str, max_streams: int) -> list[int]:
    """The stream counts that a policy is asked for: those that it may answer differently."""
    if policy == "sequential":
        return []
    if policy in ("search", "hios-lp", "hios-mr"):  # which give up streams that gain nothing
        return [max_streams]
    if policy == "ios":  # which has at most so many groups side by side
        max_streams = min(max_streams, GROUP_COUNT)
    return sorted({count for count in STREAM_COUNTS if count < max_streams} | {max_streams})
