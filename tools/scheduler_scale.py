"""Measure how long scheduling takes, and how much memory, on synthetic graphs of growing size.

    python -m tools.scheduler_scale [--out DIR] [--sizes 1000,10000,100000] [--limit 60]

Each step (every policy on the operators and on their chains, contraction, the check, simulation,
and the whole `propose`) runs on each family and size in a process of its own, which is stopped at
the limit. Times are CPU seconds of one thread, memory is what the peak of the resident set grew
by. Writes `scheduler-scale.json` and a plot of it, and prints one short table. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxsched.candidates import propose
from onnxsched.contraction import contract_chains, contract_cost
from onnxsched.cost import TableCost
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import check_schedule
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device
from tools.synthetic_graphs import FAMILIES, synthetic_problem

ROOT = Path(__file__).resolve().parent.parent
DEVICE = Device("cuda", 0)
MACHINE = Machine((DEVICE,), 16)

Problem = tuple[OperatorGraph, TableCost]


def main() -> None:
    """Parse, measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder")
    parser.add_argument("--sizes", default="1000,10000,100000", help="operators, comma-separated")
    parser.add_argument("--limit", type=int, default=60, help="seconds for a step; propose has 4x")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        family, size, step = arguments.one
        print(json.dumps(measure(synthetic_problem(family, int(size)), steps()[step])))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    results = [
        {"family": family, "operators": size, "steps": measure_all(family, size, arguments)}
        for family in FAMILIES
        for size in sizes
    ]
    report = {
        "schema_version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "streams": MACHINE.stream_count,
        "limit_s": arguments.limit,
        "results": results,
    }
    (arguments.out / "scheduler-scale.json").write_text(json_text(report))
    from tools.plots import plot_scale

    plot_scale(report, arguments.out / "scheduler-scale.svg")
    print(table(report))


def environment() -> dict[str, Any]:
    """The machine and the libraries. Asked for last, as it loads them all into this process.

    On Linux the peak of a process counts from what its parent had, and would hide the growth.
    """
    from onnxsched.environment import describe_environment

    return describe_environment(Device("cpu"))


def steps() -> dict[str, Callable[[Problem], Callable[[], object]]]:
    """For each name what prepares a step; only what that returns is measured."""

    def on_operators(policy: str) -> Callable[[Problem], Callable[[], object]]:
        return lambda problem: lambda: POLICIES[policy](*problem, MACHINE)

    def on_chains(policy: str) -> Callable[[Problem], Callable[[], object]]:
        def prepare(problem: Problem) -> Callable[[], object]:
            contraction = contract_chains(problem[0])
            cost = contract_cost(contraction, problem[1])
            return lambda: POLICIES[policy](contraction.graph, cost, MACHINE)

        return prepare

    return {
        "contract": lambda problem: lambda: contract_chains(problem[0]),
        **{policy: on_operators(policy) for policy in POLICIES},
        **{f"{policy} on chains": on_chains(policy) for policy in POLICIES},
        "check": _prepare_check,
        "simulate": _prepare_simulation,
        "propose": lambda problem: lambda: _propose(problem),
    }


def _prepare_check(problem: Problem) -> Callable[[], object]:
    schedule = POLICIES["wavefront"](*problem, MACHINE)
    return lambda: check_schedule(problem[0], MACHINE, schedule)


def _prepare_simulation(problem: Problem) -> Callable[[], object]:
    schedule = POLICIES["wavefront"](*problem, MACHINE)
    return lambda: simulate(*problem, schedule)


def _propose(problem: Problem) -> object:
    """All that scheduling does in `onnxsched optimize --policy auto` on a GPU."""
    contraction = contract_chains(problem[0])
    return propose(problem[0], contraction, problem[1], MACHINE, list(POLICIES))


def measure(
    problem: Problem, prepare: Callable[[Problem], Callable[[], object]]
) -> dict[str, float]:
    """CPU seconds and MiB that a step takes in this process."""
    work = prepare(problem)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s = time.process_time()
    result = work()
    cpu_s = time.process_time() - start_s
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del result
    return {"cpu_s": round(cpu_s, 3), "memory_mib": round(grown / 1024, 1)}


def measure_all(family: str, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each step in a process of its own; one that is stopped has only its limit."""
    results: dict[str, Any] = {}
    for step in steps():
        limit_s = arguments.limit * (4 if step == "propose" else 1)
        command = [sys.executable, "-m", "tools.scheduler_scale", "--one", family, str(size), step]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=limit_s, check=True, capture_output=True, text=True
            )
            results[step] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            results[step] = {"over_s": limit_s}
        print(f"{family} {size} {step}: {results[step]}", file=sys.stderr, flush=True)
    return results


def json_text(report: Mapping[str, Any]) -> str:
    """The report, one line for each measured step."""
    text = json.dumps(report, indent=1)
    for name in ("cpu_s", "over_s"):
        text = text.replace(f'{{\n     "{name}"', f'{{"{name}"')
    return text.replace(',\n     "memory_mib"', ', "memory_mib"').replace("\n    }", "}") + "\n"


def table(report: Mapping[str, Any]) -> str:
    """Seconds, worst of all families, by step and size."""
    sizes = sorted({result["operators"] for result in report["results"]})
    lines = [f"{'CPU s, slowest family':24}" + "".join(f"{size:>10}" for size in sizes)]
    for step in report["results"][0]["steps"]:
        cells = []
        for size in sizes:
            taken = [r["steps"][step] for r in report["results"] if r["operators"] == size]
            limits = [entry["over_s"] for entry in taken if "over_s" in entry]
            worst = max((entry.get("cpu_s", 0.0) for entry in taken), default=0.0)
            cells.append(f"over {limits[0]}" if limits else f"{worst:.2f}")
        lines.append(f"{step:24}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
