"""Measure how far the policies are from the shortest schedules of small random graphs.

    python tools/optimality_gap.py                       # prints a table
    python tools/optimality_gap.py --out FILE.json       # and keeps the results

Makespans are those that `simulate` predicts, without contention. Each policy sees the operators
themselves, not chains. Graphs whose optimum was not proven within the time limit are counted,
and left out of the ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import fmean
from typing import Any

from onnxsched.cost import OperatorCost, TableCost
from onnxsched.environment import describe_environment
from onnxsched.exact import exact
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError, UsageError

SIZES = (8, 12, 16)
STREAM_COUNTS = (2, 3, 4)
GPU = Device("cuda")
Links = set[tuple[int, int]]


@dataclass(frozen=True)
class Comparison:
    """One graph on one number of streams."""

    family: str
    operator_count: int
    stream_count: int
    is_proven: bool
    """Whether the optimum is one."""
    ratios: Mapping[str, float]
    """Of each policy's makespan to the optimum."""


def layered(rng: random.Random, operator_count: int) -> Links:
    """Layers of one to five operators, each reading one or two of the layer before."""
    links: Links = set()
    before: list[int] = []
    layer: list[int] = []
    left = rng.randint(1, 5)
    for operator in range(operator_count):
        links.update((rng.choice(before), operator) for _ in range(rng.randint(1, 2)) if before)
        layer.append(operator)
        left -= 1
        if not left:
            before, layer, left = layer, [], rng.randint(1, 5)
    return links


def series_parallel(rng: random.Random, operator_count: int) -> Links:
    """One operator, then again and again another after or beside one that is there."""
    links: Links = set()
    for new in range(1, operator_count):
        old = rng.randrange(new)
        if rng.random() < 0.5:
            links = {(new if u == old else u, v) for u, v in links} | {(old, new)}
        else:
            links |= {(u, new) for u, v in links if v == old}
            links |= {(new, v) for u, v in links if u == old}
    sorter = TopologicalSorter[int](dict.fromkeys(range(operator_count), ()))
    for u, v in sorted(links):
        sorter.add(v, u)
    number = {operator: position for position, operator in enumerate(sorter.static_order())}
    return {(number[u], number[v]) for u, v in links}


def any_order(rng: random.Random, operator_count: int) -> Links:
    """Each operator reads each one before it with the same probability, two on average."""
    share = min(1.0, 4 / (operator_count - 1))
    return {(u, v) for v in range(operator_count) for u in range(v) if rng.random() < share}


FAMILIES: Mapping[str, Callable[[random.Random, int], Links]] = {
    "layered": layered,
    "series-parallel": series_parallel,
    "random": any_order,
}


def problem(family: str, operator_count: int, seed: int) -> tuple[OperatorGraph, TableCost]:
    """A graph and durations: many short ones and few long ones, as in models.

    Durations are multiples of 1/8 us, so that times add up exactly and equal ones are equal.
    """
    rng = random.Random(f"{family}/{operator_count}/{seed}")
    operators = tuple(Operator(f"operator_{v}", "Op") for v in range(operator_count))
    links = sorted(FAMILIES[family](rng, operator_count))
    edges = tuple(Edge(u, v, f"tensor_{u}_{v}", 0) for u, v in links)
    costs = tuple(
        OperatorCost(
            max(1, round(8 * rng.lognormvariate(math.log(10.0), 0.8))) / 8,
            rng.choice(("compute", "memory")),
            rng.random(),
        )
        for _ in operators
    )
    return OperatorGraph(operators, edges), TableCost(costs)


def compare_all(graph_count: int, time_limit_s: float) -> Iterator[Comparison]:
    """Every policy on `graph_count` graphs of each family and size, for each stream count."""
    for family in FAMILIES:
        for operator_count in SIZES:
            for seed in range(graph_count):
                graph, cost = problem(family, operator_count, seed)
                for stream_count in STREAM_COUNTS:
                    machine = Machine((GPU,), stream_count)
                    best = exact(graph, cost, machine, time_limit_s=time_limit_s)
                    ratios = {
                        name: simulate(graph, cost, policy(graph, cost, machine)).makespan_us
                        / best.makespan_us
                        for name, policy in POLICIES.items()
                    }
                    yield Comparison(family, operator_count, stream_count, best.is_optimal, ratios)


def summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How often the optimum is proven, and how far from it each policy is."""
    proven = [c for c in comparisons if c.is_proven]
    return {
        "problems": len(comparisons),
        "proven": len(proven),
        "policies": {
            name: {
                "mean_ratio": fmean(c.ratios[name] for c in proven),
                "worst_ratio": max(c.ratios[name] for c in proven),
                "optimal_share": fmean(c.ratios[name] == 1.0 for c in proven),
            }
            for name in (proven[0].ratios if proven else ())
        },
    }


def report(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Summaries of all, and by family, operators and streams."""
    parts: dict[str, Callable[[Comparison], Any]] = {
        "family": lambda c: c.family,
        "operators": lambda c: c.operator_count,
        "streams": lambda c: c.stream_count,
    }
    return {
        "all": summary(comparisons),
        **{
            f"by_{part}": {
                str(value): summary([c for c in comparisons if key(c) == value])
                for value in dict.fromkeys(map(key, comparisons))
            }
            for part, key in parts.items()
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """Each policy in Markdown: means by streams, then over all."""
    by_streams, overall = results["by_streams"], results["all"]
    lines = [
        f"| policy | {' | '.join(f'{count} streams' for count in by_streams)} | mean | worst | "
        "optimal |",
        f"| --- |{' ---: |' * (len(by_streams) + 3)}",
    ]
    for name, of_policy in overall["policies"].items():
        means = [part["policies"].get(name, {}).get("mean_ratio") for part in by_streams.values()]
        ratios = [*means, of_policy["mean_ratio"], of_policy["worst_ratio"]]
        cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        cells.append(f"{of_policy['optimal_share']:.0%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Optimum proven for {overall['proven']} of {overall['problems']} problems."]
    return "\n".join(lines) + "\n"


def measure(graph_count: int, time_limit_s: float) -> dict[str, Any]:
    """All results, with what they were made by."""
    started = time.perf_counter()
    comparisons = list(compare_all(graph_count, time_limit_s))
    return {
        "schema_version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "environment": {
            **describe_environment(Device("cpu")),
            "ortools": importlib.metadata.version("ortools"),
        },
        "settings": {"graphs": graph_count, "time_limit_s": time_limit_s},
        "elapsed_s": time.perf_counter() - started,
        **report(comparisons),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Compare, write, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--graphs", type=int, default=30, help="of each family and size")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a problem")
    arguments = parser.parse_args(words)
    try:
        if arguments.graphs < 1:
            raise UsageError(f"--graphs {arguments.graphs} is too few; give at least 1.")
        if arguments.out and not arguments.out.absolute().parent.is_dir():
            raise UsageError(f"There is no folder for '{arguments.out}'; make it first.")
        results = measure(arguments.graphs, arguments.time_limit)
    except OnnxschedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
