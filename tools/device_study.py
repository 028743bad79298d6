"""Simulate when several devices help: HIOS's random graphs, and cells on measured links.

    python -m tools.device_study [--out DIR] [--seeds 5] [--sizes 1000,3000,10000]

Sweeps vary one thing at a time: devices, operators, edges, layers, the ratio of communication to
computation, how long operators take between links as measured, and the size. Each policy that
uses several devices is compared with the best schedules on one. All times are what the simulator
predicts, but for the CPU seconds that policies take. Writes `device-study.json` and a plot of it,
and prints a short table. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from onnxsched.calibration import TYPICAL
from onnxsched.cost import TableCost
from onnxsched.environment import describe_environment
from onnxsched.graph import OperatorGraph
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.schedule import check_schedule
from onnxsched.simulate import critical_path_us, simulate
from onnxsched_runtime.device import Device
from tools.synthetic_graphs import hios_problem, synthetic_problem

ROOT = Path(__file__).resolve().parent.parent
DEVICES = tuple(Device("cuda", index) for index in range(8))
STREAM_COUNT = 2
"""Of each device: the most that HIOS's code uses."""
ALONE = ("ios", "heft", "search")
"""What is asked for schedules of one device."""
TOGETHER = ("heft", "hios-lp", "hios-mr", "search")

Problem = tuple[OperatorGraph, TableCost]


@dataclass(frozen=True)
class Point:
    """One setting of everything."""

    sweep: str
    value: float
    """What the sweep varies."""
    device_count: int = 4
    operator_count: int = 200
    edge_count: int = 400
    layer_count: int = 32
    ratio: float = 0.8
    median_us: float = 0.0
    """Of operators in cells like NASNet's, between measured links; 0 for HIOS's graphs."""

    def problem(self, seed: int) -> Problem:
        """One of the graphs of this setting, with its costs."""
        if not self.median_us:
            shape = (self.operator_count, self.edge_count, self.layer_count)
            return hios_problem(*shape, self.ratio, seed)
        graph, cost = synthetic_problem("nasnet", self.operator_count, seed)
        operators = tuple(
            replace(operator, duration_us=operator.duration_us * self.median_us / 8, sm_share=0.8)
            for operator in cost.operators
        )
        return graph, replace(cost, operators=operators, contention=TYPICAL)


def points(sizes: Sequence[int]) -> Iterator[Point]:
    """All settings."""
    for count in (1, 2, 4, 8):
        yield Point("devices", count, device_count=count)
    for count in (50, 100, 200, 400):
        yield Point("operators", count, 4, count, 2 * count)
    for count in (200, 400, 800, 1600):
        yield Point("edges", count, edge_count=count)
    for count in (4, 8, 16, 32, 64, 128):
        yield Point("layers", count, layer_count=count)
    for ratio in (0.1, 0.4, 0.8, 1.6, 3.2):
        yield Point("ratio", ratio, ratio=ratio)
    for median_us in (0.5, 2, 8, 32, 128):
        yield Point("duration", median_us, 2, median_us=median_us)
    for count in sizes:
        yield Point("size", count, 8, count, 2 * count, count // 6)


@cache  # Sweeps cross where all is as by default.
def measured(point: Point, seed: int) -> dict[str, Any]:
    """The longest path and each policy: speed-ups over one stream, and CPU seconds taken."""
    graph, cost = point.problem(seed)
    machine = Machine(DEVICES[: point.device_count], STREAM_COUNT)
    sequential = POLICIES["sequential"](graph, cost, machine)
    sequential_us = simulate(graph, cost, sequential).makespan_us
    path_us = critical_path_us(graph, cost, DEVICES[0]) * cost.contention.duration_factor
    policies = {}
    asked = [(name, f"{name} alone", machine.alone) for name in ALONE]
    asked += [(name, name, machine) for name in TOGETHER]
    for name, label, used in asked:
        started = time.process_time()
        schedule = POLICIES[name](graph, cost, used)
        cpu_s = time.process_time() - started
        check_schedule(graph, used, schedule)
        speedup = sequential_us / simulate(graph, cost, schedule).makespan_us
        policies[label] = {"speedup": speedup, "cpu_s": cpu_s}
    return {"longest_path": sequential_us / path_us, "policies": policies}


def averaged(point: Point, seeds: int) -> dict[str, Any]:
    """A setting with the means over its graphs; large ones are only looked at once."""
    setting = replace(point, sweep="", value=0)
    found = [measured(setting, seed) for seed in range(1 if point.sweep == "size" else seeds)]
    return {
        **asdict(point),
        "graphs": len(found),
        "longest_path": round(fmean(entry["longest_path"] for entry in found), 3),
        "policies": {
            label: {
                key: round(fmean(entry["policies"][label][key] for entry in found), 3)
                for key in ("speedup", "cpu_s")
            }
            for label in found[0]["policies"]
        },
    }


def by_value(
    results: Sequence[Mapping[str, Any]], sweep: str, key: str
) -> dict[float, dict[str, float]]:
    """For each value of a sweep the `speedup` or `cpu_s` of each policy."""
    return {
        r["value"]: {label: entry[key] for label, entry in r["policies"].items()}
        for r in results
        if r["sweep"] == sweep
    }


def json_text(report: Mapping[str, Any]) -> str:
    """The report, one line for each policy of a setting."""
    text = json.dumps(report, indent=1)
    text = text.replace('{\n     "speedup"', '{"speedup"')
    return text.replace(',\n     "cpu_s"', ', "cpu_s"').replace("\n    }", "}") + "\n"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Speed-ups over one stream in Markdown, and what the longest path would allow."""
    labels = list(results[0]["policies"])
    lines = [
        f"| sweep | value | {' | '.join(labels)} | longest path |",
        "| --- |" + " ---: |" * (len(labels) + 2),
    ]
    for r in results:
        cells = [f"{r['policies'][label]['speedup']:.2f}" for label in labels]
        cells.append(f"{r['longest_path']:.2f}")
        lines.append(f"| {r['sweep']} | {r['value']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, simulate, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder")
    parser.add_argument("--seeds", type=int, default=5, help="graphs of each setting")
    parser.add_argument("--sizes", default="1000,3000,10000", help="operators, comma-separated")
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for point in points([int(size) for size in arguments.sizes.split(",")]):
        results.append(averaged(point, arguments.seeds))
        print(f"{point.sweep} {point.value:g}", file=sys.stderr, flush=True)
    report = {
        "schema_version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(Device("cpu")),
        "streams": STREAM_COUNT,
        "seeds": arguments.seeds,
        "results": results,
    }
    (arguments.out / "device-study.json").write_text(json_text(report))
    from tools.device_plots import plot_study

    plot_study(results, arguments.out / "device-study.svg")
    print(table(results))


if __name__ == "__main__":
    main()
