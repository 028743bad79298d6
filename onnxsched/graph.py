"""The operator graph: all that scheduling knows of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

RANDOM_TYPES = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
    "Bernoulli",
})  # fmt: skip
"""Types of operators that write something else each time."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that is there before the run: a weight, or an input of the model."""

    tensor: str
    nbytes: int
    is_input: bool = False
    """The caller's, on one device only; weights are on every device that reads them."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of the model, identified by its unique node name."""

    name: str
    op_type: str
    host_reason: str | None = None
    """Why it can't be part of a captured CUDA graph; None where it can."""
    weights: tuple[Weight, ...] = ()
    """Those that it reads; operators may share them."""
    kept_nbytes: int = 0
    """Of what it writes, what is not freed before the end: outputs of the model."""
    scratch_nbytes: int = 0
    """What it needs beside its inputs and outputs while it runs."""
    is_view: bool = False
    """It only gives what it reads another shape: beside what writes that, it costs nothing."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor that flows from one operator to another."""

    producer: int
    """Index into `OperatorGraph.operators`."""
    consumer: int
    """Index into `OperatorGraph.operators`."""
    tensor: str
    nbytes: int
    """Size of the tensor, 0 where it is not known before the run."""


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in topological order and the tensors between them.

    An operator is its index into `operators` everywhere in scheduling.
    """

    operators: tuple[Operator, ...]
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        """Check that edges point forward and that names are unique."""
        if len({operator.name for operator in self.operators}) != len(self.operators):
            raise ValueError("operator names are not unique")
        for edge in self.edges:
            if not 0 <= edge.producer < edge.consumer < len(self.operators):
                raise ValueError(f"{edge} does not point forward in {len(self)} operators")

    def __len__(self) -> int:
        return len(self.operators)

    @cached_property
    def incoming(self) -> tuple[tuple[Edge, ...], ...]:
        """The edges into each operator, in the order of `edges`."""
        return self._grouped((edge.consumer, edge) for edge in self.edges)

    @cached_property
    def outgoing(self) -> tuple[tuple[Edge, ...], ...]:
        """The edges out of each operator, in the order of `edges`."""
        return self._grouped((edge.producer, edge) for edge in self.edges)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """The distinct producers of each operator's inputs, in input order."""
        return tuple(tuple(dict.fromkeys(e.producer for e in edges)) for edges in self.incoming)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """The distinct consumers of each operator's outputs."""
        return tuple(tuple(dict.fromkeys(e.consumer for e in edges)) for edges in self.outgoing)

    @cached_property
    def tensors(self) -> dict[str, tuple[Edge, ...]]:
        """The edges of each tensor."""
        edges_of: dict[str, list[Edge]] = {}
        for edge in self.edges:
            edges_of.setdefault(edge.tensor, []).append(edge)
        return {tensor: tuple(edges) for tensor, edges in edges_of.items()}

    @cached_property
    def total_nbytes(self) -> int:
        """Weights and tensors, each once, outputs and all scratch: no schedule needs more."""
        own = sum(operator.kept_nbytes + operator.scratch_nbytes for operator in self.operators)
        weights = {w.tensor: w.nbytes for operator in self.operators for w in operator.weights}
        return own + sum(weights.values()) + sum(e[0].nbytes for e in self.tensors.values())

    def _grouped(self, keyed: Iterable[tuple[int, Edge]]) -> tuple[tuple[Edge, ...], ...]:
        groups: list[list[Edge]] = [[] for _ in self.operators]
        for key, edge in keyed:
            groups[key].append(edge)
        return tuple(map(tuple, groups))
