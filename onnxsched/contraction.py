"""Contract linear chains of operators, schedule the smaller graph, and expand the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from onnxsched.cost import Contention, CostModel, OperatorCost, mean_share
from onnxsched.graph import Edge, Operator, OperatorGraph, Weight
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.naming import new_name


@dataclass(frozen=True, slots=True)
class Contraction:
    """A graph whose operators are the maximal linear chains of another graph."""

    graph: OperatorGraph
    groups: tuple[tuple[int, ...], ...]
    """For each operator of `graph` the operators it stands for, in topological order; none for an
    input of the model."""


@dataclass(frozen=True, slots=True)
class ContractedCost:
    """The costs of a contracted graph, read from those of the original graph."""

    groups: tuple[tuple[int, ...], ...]
    original: CostModel
    _on_device: dict[Device, tuple[OperatorCost, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Made at the first question about a device: a policy asks for each operator many times."""

    @property
    def contention(self) -> Contention:
        """As in the original."""
        return self.original.contention

    def operator(self, operator: int, device: Device) -> OperatorCost:
        """Sum of the durations, bound of the longest member, largest block share, mean SM share.

        Views take time only in a chain of nothing else, and inputs none.
        """
        if device not in self._on_device:
            self._on_device[device] = tuple(self._sum(group, device) for group in self.groups)
        return self._on_device[device][operator]

    def transfer_us(self, nbytes: int, source: Device, target: Device) -> float:
        """As in the original: only tensors between groups are ever transferred."""
        return self.original.transfer_us(nbytes, source, target)

    def _sum(self, group: tuple[int, ...], device: Device) -> OperatorCost:
        if not group:
            return OperatorCost(0.0)
        members = [self.original.operator(member, device) for member in group]
        costs = [cost for cost in members if not cost.is_view] or members
        return OperatorCost(
            duration_us=sum(cost.duration_us for cost in costs),
            bound=max(costs, key=lambda cost: cost.duration_us).bound,
            block_share=max(cost.block_share for cost in costs),
            sm_share=mean_share((cost.duration_us, cost.sm_share) for cost in costs),
            is_view=costs[0].is_view,
        )


def contract_chains(graph: OperatorGraph, *, with_inputs: bool = False) -> Contraction:
    """Make each maximal linear chain one operator, with the views of what it writes.

    Operators u -> v are joined when v is u's only successor and u is v's only predecessor, and
    both or neither can be captured. Such a chain has no parallelism inside and nothing waits for
    its middle, so a stream of its own runs it as fast as any schedule can. Only on one that must
    be shared is something given up: no other operator can run between two members. A view that
    alone reads a tensor is joined with what writes that, even if it writes others too, as a Split
    does: by itself the view would be a copy. A chain ends with its first such view.

    Contracted operators are ordered by first member. This is topological: an edge between groups
    enters the first member of one, since all others read from their own group only, and edges of
    the original point forward, so first(A) < first(B). O(n + edges).

    Args:
        graph: The operators.
        with_inputs: Make operators without a duration of the model's inputs, for several devices:
            the caller has them on one, and to read them on another is a transfer like any. What
            cuts a piece out of a tensor ends its chain then: only the piece need be transferred.
    """
    group_of: list[int] = []
    groups: list[list[int]] = []
    forked: set[int] = set()
    for operator in range(len(graph)):
        previous = _link_into(graph, operator)
        if previous is not None and group_of[previous] in forked:
            previous = None
        if with_inputs and previous is not None and _cuts(graph, previous):
            previous = None
        if previous is None and _is_view_of_fork(graph, operator):
            [previous] = graph.predecessors[operator]
            forked.add(group_of[previous])
        if previous is None:
            group_of.append(len(groups))
            groups.append([operator])
        else:
            group_of.append(group_of[previous])
            groups[group_of[previous]].append(operator)
    edges = tuple(
        replace(edge, producer=group_of[edge.producer], consumer=group_of[edge.consumer])
        for edge in graph.edges
        if group_of[edge.producer] != group_of[edge.consumer]
    )
    operators = tuple(_joined(graph, group) for group in groups)
    contracted = Contraction(OperatorGraph(operators, edges), tuple(map(tuple, groups)))
    return _with_inputs(contracted) if with_inputs else contracted


def uncontracted(graph: OperatorGraph) -> Contraction:
    """The graph as it is: every operator is a chain of its own."""
    return Contraction(graph, tuple((operator,) for operator in range(len(graph))))


def contract_cost(contraction: Contraction, cost: CostModel) -> ContractedCost:
    """The costs of `contraction.graph`, given those of the graph it was made from."""
    return ContractedCost(contraction.groups, cost)


def expand(contraction: Contraction, schedule: Schedule) -> Schedule:
    """A schedule of the contracted graph as one of the original graph.

    The members of a group are launched back to back on the group's placement.
    """
    return Schedule(
        tuple(
            Slot(member, slot.placement)
            for slot in schedule.slots
            for member in contraction.groups[slot.operator]
        )
    )


def settled(contraction: Contraction, schedule: Schedule) -> Schedule:
    """A schedule of the contracted graph with each input of the model where plans have it.

    That is where its first reader is, whatever a policy thought. O(n + edges).
    """
    graph = contraction.graph
    inputs = [number for number, group in enumerate(contraction.groups) if not group]
    if not inputs:
        return schedule
    first: dict[int, Placement] = {}
    for slot in schedule.slots:
        for producer in graph.predecessors[slot.operator]:
            first.setdefault(producer, slot.placement)
    others = [slot for slot in schedule.slots if contraction.groups[slot.operator]]
    return Schedule((*(Slot(number, first[number]) for number in inputs), *others))


def _link_into(graph: OperatorGraph, operator: int) -> int | None:
    """The operator that this one continues in a linear chain, None at the head of a chain."""
    if len(graph.predecessors[operator]) != 1:
        return None
    [previous] = graph.predecessors[operator]
    if len(graph.successors[previous]) != 1 or _crosses_capture(graph, operator, previous):
        return None
    return previous


def _is_view_of_fork(graph: OperatorGraph, operator: int) -> bool:
    """Whether an operator is a view that begins no chain, of a tensor that nothing else reads."""
    incoming, successors = graph.incoming[operator], graph.successors[operator]
    if not graph.operators[operator].is_view or len(incoming) != 1:
        return False
    if len(graph.tensors[incoming[0].tensor]) != 1:
        return False
    begins_chain = len(successors) == 1 and len(graph.predecessors[successors[0]]) == 1
    return not begins_chain and not _crosses_capture(graph, operator, incoming[0].producer)


def _cuts(graph: OperatorGraph, operator: int) -> bool:
    """Whether an operator cuts a piece out of a tensor, or else makes less of the model's inputs.

    Of what it reads whoever has the whole need only send the piece.
    """
    node = graph.operators[operator]
    read = sum(weight.nbytes for weight in node.weights if weight.is_input)
    if node.op_type in ("Slice", "Transpose"):  # which may have taken one in
        read += sum({edge.tensor: edge.nbytes for edge in graph.incoming[operator]}.values())
    return sum({e.tensor: e.nbytes for e in graph.outgoing[operator]}.values()) < read


def _with_inputs(contraction: Contraction) -> Contraction:
    """The contraction with an operator for each input of the model, before all others."""
    graph = contraction.graph
    taken = {operator.name for operator in graph.operators}
    readers: dict[Weight, list[int]] = {}
    for number, operator in enumerate(graph.operators):
        for weight in operator.weights:
            if weight.is_input:
                readers.setdefault(weight, []).append(number)
    inputs, edges = [], []
    for number, (weight, reading) in enumerate(readers.items()):
        name = new_name(weight.tensor, taken)
        inputs.append(Operator(name, "Input", weights=(weight,)))  # it stays to the end
        edges += [
            Edge(number, len(readers) + reader, weight.tensor, weight.nbytes) for reader in reading
        ]
    edges += [
        replace(e, producer=len(readers) + e.producer, consumer=len(readers) + e.consumer)
        for e in graph.edges
    ]
    others = [
        replace(operator, weights=tuple(w for w in operator.weights if not w.is_input))
        for operator in graph.operators
    ]
    groups = ((),) * len(readers) + contraction.groups
    return Contraction(OperatorGraph((*inputs, *others), tuple(edges)), groups)


def _crosses_capture(graph: OperatorGraph, *operators: int) -> bool:
    """Whether some of the operators can be captured and others can't."""
    return len({graph.operators[index].host_reason is None for index in operators}) > 1


def _joined(graph: OperatorGraph, group: Sequence[int]) -> Operator:
    """A chain as one operator. What its members hand on is scratch, as is what they need."""
    members = [graph.operators[member] for member in group]
    reads = [sum(e.nbytes for e in graph.incoming[member]) for member in group[1:]]
    scratch = [
        before + member.scratch_nbytes + after
        for before, member, after in zip([0, *reads], members, [*reads, 0], strict=True)
    ]
    return replace(
        members[0],
        op_type="+".join(member.op_type for member in members),
        weights=tuple(dict.fromkeys(w for member in members for w in member.weights)),
        kept_nbytes=sum(member.kept_nbytes for member in members),
        scratch_nbytes=max(scratch),
    )
