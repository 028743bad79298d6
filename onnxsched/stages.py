"""The best sequence of stages, each a few groups of operators side by side: IOS's search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import chain
from math import inf

from onnxsched.cost import Contention, CostModel, OperatorCost, mean_share
from onnxsched.graph import OperatorGraph
from onnxsched.rank import rank_order, upward_ranks_us
from onnxsched_runtime.device import Device

PART_SIZE = 32
"""Most operators that are searched together."""
ENDINGS_PER_GRAPH = 30_000
ENDINGS_PER_OPERATOR = 10
"""A search of m operators looks at m times the larger of this and the graph's share of
`ENDINGS_PER_GRAPH`. Up to 3 operators need less: they have at most 3^3 - 2^3 endings."""


@dataclass(frozen=True, slots=True)
class Group:
    """Connected operators that run one after another on one stream."""

    operators: tuple[int, ...]
    """In topological order."""
    work_us: float
    sm_share: float = 0.0
    """Of the device's multiprocessors, on average."""


Stage = tuple[Group, ...]
"""Groups that run side by side, the longest first."""


def stage_us(groups: Sequence[Group], contention: Contention) -> float:
    """How long a stage takes: as long as its longest group, slowed down by the others.

    `best_stages` needs of it that no stage is shorter than its longest group, and that a group
    alone takes its work and no more: else the blocks could not be searched one by one.
    """
    shares = sum(group.sm_share for group in groups)
    return max(
        group.work_us
        * (
            1
            + contention.sm_slowdown * (shares - group.sm_share)
            + contention.launch_slowdown * (len(groups) - 1)
        )
        for group in groups
    )


def best_stages(
    graph: OperatorGraph, cost: CostModel, device: Device, group_size: int, group_count: int
) -> list[Stage]:
    """The stages with the smallest sum of `stage_us`: IOS's dynamic programme.

    What remains of the graph ends with a stage; the groups of a stage are its connected
    components, so they are disjoint sets that are connected and closed under successors. As in
    the paper, the graph is cut into blocks at operators through which every path goes, which
    loses nothing: no other operator can run beside those. States are visited best first (A*), by
    the time spent and the larger of the longest path and the work per stream that remain.

    The work is bounded. A block of more than `PART_SIZE` operators is halved by upward rank; a
    search that has looked at too many endings (`ENDINGS_PER_OPERATOR`) is repeated with smaller
    groups, at last of one operator, and then in halves. The result is the optimum for the given
    pruning only where neither happens; blocks of up to 7 operators in graphs of up to 100
    operators always keep to that. O((n + ENDINGS_PER_GRAPH) * group_size * log PART_SIZE)
    endings: below 10 s for 10,000 operators.

    Args:
        graph: The operators.
        cost: Their durations.
        device: Where they run.
        group_size: The most operators in a group, r in the paper.
        group_count: The most groups in a stage, s in the paper.
    """
    costs = [cost.operator(operator, device) for operator in range(len(graph))]
    share = max(ENDINGS_PER_OPERATOR, ENDINGS_PER_GRAPH // max(1, len(graph)))

    def stages_of(members: Sequence[int]) -> list[Stage]:
        if len(members) <= PART_SIZE:
            part = _Part(graph, costs, tuple(members))
            for size in range(min(group_size, len(members)), 0, -1):
                limit = share * len(members)
                stages = _search(part, cost.contention, size, group_count, limit)
                if stages is not None:
                    return stages
        middle = len(members) // 2
        return stages_of(members[:middle]) + stages_of(members[middle:])

    order = rank_order(upward_ranks_us(graph, cost, device))
    return list(chain.from_iterable(map(stages_of, _blocks(graph, order))))


def _blocks(graph: OperatorGraph, order: Sequence[int]) -> Iterator[list[int]]:
    """Cut a topological order around each operator that all others lead to or come from."""
    cuts = _meeting_points(order, graph.predecessors)
    cuts &= _meeting_points(order[::-1], graph.successors)
    block: list[int] = []
    for operator in order:
        if operator not in cuts:
            block.append(operator)
            continue
        if block:
            yield block
        yield [operator]
        block = []
    if block:
        yield block


def _meeting_points(order: Sequence[int], sources: Sequence[Sequence[int]]) -> set[int]:
    """The operators that all those before them in `order` lead to."""
    ends: set[int] = set()
    found: set[int] = set()
    for operator in order:
        ends.difference_update(sources[operator])
        ends.add(operator)
        if len(ends) == 1:
            found.add(operator)
    return found


@dataclass(frozen=True)
class _Part:
    """Some operators that are searched together; sets of them are bits, by position."""

    graph: OperatorGraph
    costs: Sequence[OperatorCost]
    """Of all operators of the graph."""
    members: tuple[int, ...]
    """In topological order."""

    @cached_property
    def closures(self) -> tuple[int, ...]:
        """Each member and those that come after it."""
        position_of = {operator: position for position, operator in enumerate(self.members)}
        closures = [0] * len(self.members)
        for operator, position in reversed(position_of.items()):
            closures[position] = 1 << position
            for successor in self.graph.successors[operator]:
                if successor in position_of:
                    closures[position] |= closures[position_of[successor]]
        return tuple(closures)

    @cached_property
    def paths(self) -> tuple[tuple[float, int], ...]:
        """The longest path that ends with each member, and the member, the longest path first."""
        path_us: dict[int, float] = {}
        for operator in self.members:
            before_us = (path_us.get(p, 0.0) for p in self.graph.predecessors[operator])
            path_us[operator] = max(before_us, default=0.0) + self.costs[operator].duration_us
        pairs = ((path_us[operator], 1 << i) for i, operator in enumerate(self.members))
        return tuple(sorted(pairs, reverse=True))

    def group(self, members: int) -> Group:
        """The group that consists of these members."""
        operators = [v for position, v in enumerate(self.members) if members >> position & 1]
        costs = [self.costs[v] for v in operators]
        return Group(
            tuple(operators),
            sum(cost.duration_us for cost in costs),
            mean_share((cost.duration_us, cost.sm_share) for cost in costs),
        )

    def groups(self, remaining: int, size: int) -> list[int]:
        """The connected sets of up to `size` members that nothing else that remains reads.

        Those that come from one member, and unions of such that overlap. Two that are disjoint
        are not connected, for each holds all that its members lead to.
        """
        from_one = {
            closure & remaining
            for position, closure in enumerate(self.closures)
            if remaining >> position & 1 and (closure & remaining).bit_count() <= size
        }
        found, fresh = set(from_one), list(from_one)
        while fresh:
            members = fresh.pop()
            for others in from_one:
                union = members | others
                if members & others and union not in found and union.bit_count() <= size:
                    found.add(union)
                    fresh.append(union)
        return sorted(found)


def _search(
    part: _Part, contention: Contention, size: int, count: int, limit: int
) -> list[Stage] | None:
    """The best stages of a part; None where that takes more than `limit` endings."""
    everything = (1 << len(part.members)) - 1
    group_of: dict[int, Group] = {}
    spent_us = {everything: 0.0}
    work_us = {everything: sum(part.costs[v].duration_us for v in part.members)}
    last_step: dict[int, tuple[int, Stage]] = {}
    queue = [(0.0, len(part.members), everything)]
    visited: set[int] = set()
    while True:
        _, _, remaining = heappop(queue)
        if not remaining:
            return _stages_to_the_end(last_step)
        if remaining in visited:
            continue
        visited.add(remaining)
        sets = part.groups(remaining, size)
        for members in sets:
            if members not in group_of:
                group_of[members] = part.group(members)
        for ending, chosen in _endings(sets, count):
            limit -= 1
            if limit < 0:
                return None
            rest = remaining ^ ending
            stage = tuple(group_of[members] for members in chosen)
            us = spent_us[remaining] + stage_us(stage, contention)
            if us < spent_us.get(rest, inf):
                spent_us[rest] = us
                work_us[rest] = work_us[remaining] - sum(group.work_us for group in stage)
                last_step[rest] = (remaining, stage)
                path_us = next((path for path, member in part.paths if rest & member), 0.0)
                bound_us = max(path_us, work_us[rest] / count)
                heappush(queue, (us + bound_us, rest.bit_count(), rest))


def _endings(sets: Sequence[int], count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Up to `count` disjoint sets and their union, in every way."""
    open_choices: list[tuple[int, tuple[int, ...], int]] = [(0, (), 0)]
    while open_choices:
        union, chosen, first = open_choices.pop()
        for number in range(first, len(sets)):
            if not sets[number] & union:
                ending = union | sets[number], (*chosen, sets[number])
                yield ending
                if len(ending[1]) < count:
                    open_choices.append((*ending, number + 1))


def _stages_to_the_end(last_step: dict[int, tuple[int, Stage]]) -> list[Stage]:
    """The stages in the order in which they run: what was taken off last runs first."""
    stages: list[Stage] = []
    remaining = 0
    while remaining in last_step:
        remaining, stage = last_step[remaining]
        stages.append(tuple(sorted(stage, key=lambda group: -group.work_us)))
    return stages
