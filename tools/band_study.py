"""Simulate what bands of rows, and operators computed twice, bring on several devices.

    python -m tools.band_study [--out DIR]

Sample models at several image sizes are scheduled on one device, on several, and on several in
bands. Durations are not measured but a roofline's, for whole images as for bands; its rates are
chosen so that the best schedule of Inception-v3 at 2048x2048 on one device takes about what it
was measured to take on an H200. Copies are those of two H200s, or assumed where `LINKS` says so.
Writes `band-study.json` and prints a table. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxsched.bands import banded
from onnxsched.calibration import TYPICAL
from onnxsched.contraction import contract_chains, contract_cost, expand
from onnxsched.cost import Bound, OperatorCost, TableCost
from onnxsched.environment import describe_environment
from onnxsched.loading import Model, graph_from_model, load_model
from onnxsched.machine import Machine
from onnxsched.policies import POLICIES
from onnxsched.recomputing import recompute
from onnxsched.regions import BandRegion, find_bands
from onnxsched.schedule import check_schedule
from onnxsched.seeding import band_schedule
from onnxsched.simulate import simulate
from onnxsched.transfer import NVLINK, TransferCurve
from onnxsched_runtime.device import Device
from sample_models import build

ROOT = Path(__file__).resolve().parent.parent
STREAM_COUNT = 3
POLICY_NAMES = ("heft", "hios-lp", "search")
FLOPS_PER_US = 90e6
BYTES_PER_US = 3.5e6
LEAST_US = 2.0
"""Of an operator: launch and ramp."""
SM_ELEMENTS = 4096
"""Of a result, for each multiprocessor that an operator covers."""
SM_COUNT = 132
LINKS = {
    "NVLink": NVLINK,
    "PCIe": TransferCurve(((4 << 10, 12.0), (1 << 20, 54.0), (16 << 20, 680.0)), is_peer=True),
    "host": TransferCurve(((4 << 10, 25.0), (1 << 20, 130.0), (16 << 20, 1700.0)), is_peer=False),
}
"""Copies as measured, at 25 GB/s, and through the host at 10 GB/s; the last two are assumed."""


@dataclass(frozen=True)
class Setting:
    """A model and the devices it is spread over."""

    model: str
    image: int
    device_count: int = 2
    link: str = "NVLink"


SETTINGS = (
    Setting("inception_v3", 299),
    Setting("inception_v3", 512),
    Setting("inception_v3", 1024),
    Setting("inception_v3", 2048),
    Setting("inception_v3", 2048, 4),
    Setting("googlenet", 2048),
    Setting("nasnet_large", 1024),
    Setting("googlenet", 1024, link="PCIe"),
    Setting("inception_v3", 1024, link="PCIe"),
    Setting("inception_v3", 1024, link="host"),
)


def roofline_cost(model: Model) -> TableCost:
    """The longer of arithmetic and memory traffic for each operator of a model."""
    weights = {weight.name: weight for weight in model.proto.graph.initializer}
    return TableCost(
        tuple(_cost(model, weights, node) for node in model.proto.graph.node), contention=TYPICAL
    )


def _cost(
    model: Model, weights: Mapping[str, onnx.TensorProto], node: onnx.NodeProto
) -> OperatorCost:
    kinds = [model.tensors[tensor] for tensor in node.output if tensor]
    elements = sum(math.prod(kind.shape or ()) for kind in kinds)
    written_nbytes = sum(kind.nbytes for kind in kinds)
    read_nbytes = written_nbytes  # A Slice reads what it writes.
    if node.op_type != "Slice":
        read_nbytes = sum(model.tensors[t].nbytes for t in node.input if t in model.tensors)
    read_nbytes += sum(4 * math.prod(weights[t].dims) for t in node.input if t in weights)
    flops = 0
    if node.op_type.endswith("Conv"):
        flops = 2 * elements * math.prod(weights[node.input[1]].dims[1:])
    traffic_us = (read_nbytes + written_nbytes) / BYTES_PER_US
    duration_us = max(LEAST_US, flops / FLOPS_PER_US, traffic_us)
    if node.op_type == "FusedConv":  # Where it is loaded for a GPU a Relu comes after it.
        duration_us += max(LEAST_US, 2 * written_nbytes / BYTES_PER_US)
    bound: Bound = "memory" if traffic_us > flops / FLOPS_PER_US else "compute"
    share = min(1.0, elements / (SM_COUNT * SM_ELEMENTS))
    return OperatorCost(duration_us, bound, sm_share=share)


def predicted(model: Model, device_count: int, link: str) -> dict[str, float]:
    """The makespan of each policy's schedule, and of the one for bands.

    And of the best of them that uses several devices, with what it had better compute `twice`;
    `copies` is how many operators that are.
    """
    graph = graph_from_model(model)
    cost = replace(roofline_cost(model), unmeasured=LINKS[link])
    machine = Machine(tuple(Device("cuda", n) for n in range(device_count)), STREAM_COUNT)
    chains = contract_chains(graph)
    chain_cost = contract_cost(chains, cost)
    schedules = {
        name: expand(chains, POLICIES[name](chains.graph, chain_cost, machine))
        for name in (*POLICY_NAMES, *(["sequential"] if device_count == 1 else []))
    }
    seed = band_schedule(graph, cost, machine)
    if seed is not None:
        schedules["bands"] = seed
    found = {}
    for name, schedule in schedules.items():
        check_schedule(graph, machine, schedule)
        found[name] = simulate(graph, cost, schedule).makespan_us
    spread = [name for name, schedule in schedules.items() if len(schedule.devices) > 1]
    if spread:
        best = recompute(graph, cost, machine, schedules[min(spread, key=found.__getitem__)])
        found["twice"] = simulate(best.graph, best.cost, best.schedule).makespan_us
        found["copies"] = len(best.duplicates)
    return {name: round(number, 1) for name, number in found.items()}


def studied(setting: Setting) -> dict[str, Any]:
    """A setting with all its predictions in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(build(setting.model, image=setting.image).SerializeToString())
        model = load_model(path, Device("cpu"))
    return {
        **asdict(setting),
        "one_device_us": predicted(model, 1, setting.link),
        "whole_us": predicted(model, setting.device_count, setting.link),
        "schemes": {
            scheme: {
                **_described(region),
                "us": predicted(
                    banded(model, region.groups, region.count), region.count, setting.link
                ),
            }
            for scheme, region in find_bands(model, setting.device_count).items()
        },
    }


def _described(region: BandRegion) -> dict[str, Any]:
    return {
        "operators": sum(map(len, region.groups)),
        "groups": len(region.groups),
        "overhead": round(region.overhead, 4),
        "read_nbytes": region.read_nbytes,
        "exchanged_nbytes": region.exchanged_nbytes,
        "joined_nbytes": region.joined_nbytes,
    }


def best_us(entry: Mapping[str, float]) -> float:
    """The shortest of the predictions."""
    return min(us for name, us in entry.items() if name != "copies")


def gain_by_copies(entry: Mapping[str, float]) -> float:
    """By how much of itself the shortest prediction shrinks where operators are computed twice."""
    once_us = best_us({name: us for name, us in entry.items() if name != "twice"})
    return 1 - best_us(entry) / once_us


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Speed-ups over the best schedule on one device in Markdown."""
    return "\n".join(_lines(results))


def _lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| model | devices | link | one device, us | whole | by copies | scheme | groups "
        "| done twice | in bands | by copies |"
    )
    yield "| --- | ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for r in results:
        one_us = best_us(r["one_device_us"])
        for scheme, entry in r["schemes"].items():
            yield (
                f"| {r['model']} {r['image']} | {r['device_count']} | {r['link']} | {one_us:.0f} "
                f"| {one_us / best_us(r['whole_us']):.2f} | {gain_by_copies(r['whole_us']):.1%} "
                f"| {scheme} | {entry['groups']} | {entry['overhead']:.1%} "
                f"| {one_us / best_us(entry['us']):.2f} | {gain_by_copies(entry['us']):.1%} |"
            )


def main(words: Sequence[str] | None = None) -> None:
    """Parse, simulate, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder")
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in SETTINGS:
        print(f"{setting}", file=sys.stderr, flush=True)
        results.append(studied(setting))
    report = {
        "schema_version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(Device("cpu")),
        "streams": STREAM_COUNT,
        "flops_per_us": FLOPS_PER_US,
        "bytes_per_us": BYTES_PER_US,
        "results": results,
    }
    (arguments.out / "band-study.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
