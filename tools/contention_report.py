"""Predict the schedules of a committed measurement, before and after calibration.

python tools/contention_report.py docs/benchmarks/h200-contention.json --out predictions.json

The measurement holds for each model `chains` (microseconds alone, share of the multiprocessors),
`edges` (producer, consumer) and `schedules` (launch order, stream of each of these, measured
microseconds of one CUDA graph). Those marked `calibrates` are what a user's machine would have
measured: they calibrate, and only the others are predicted.

The predictions hold for each model the contention found and, for `alone`, `typical` and
`calibrated`, the mean absolute error, Spearman's rank correlation and the predicted times;
`measured_us` is in the same order. `tools/prediction_plot.py` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxsched.calibration import TYPICAL, calibrate
from onnxsched.cost import Contention, OperatorCost, TableCost
from onnxsched.graph import Edge, Operator, OperatorGraph
from onnxsched.schedule import Schedule, Slot
from onnxsched.simulate import simulate
from onnxsched_runtime.device import Device, Placement

_GPU = Device("cuda", 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a measurement, write the predictions, print how good they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measurement", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where to write the predictions")
    options = parser.parse_args(arguments)
    try:
        predicted = predictions(json.loads(options.measurement.read_text()))
    except (OSError, KeyError, TypeError, ValueError) as error:
        sys.exit(
            f"'{options.measurement}' is no measurement of schedules ({error}); give another."
        )
    options.out.write_text(json.dumps(predicted) + "\n")
    print(table(predicted))


def predictions(measurement: Mapping[str, Any]) -> dict[str, Any]:
    """The predictions of every model, in the format above."""
    kept = {key: measurement[key] for key in ("date", "environment")}
    models = {name: _predicted(model) for name, model in measurement["models"].items()}
    return {"schema_version": 1, **kept, "models": models}


def table(predicted: Mapping[str, Any]) -> str:
    """Errors and rank correlations in Markdown."""
    lines = [
        "| model | schedules | without contention | typical contention | calibrated |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, model in predicted["models"].items():
        cells = [
            f"{100 * found['mean_absolute_error']:.1f} %, {found['rank_correlation']:.3f}"
            for found in model["predictions"].values()
        ]
        lines.append(f"| {name} | {len(model['measured_us'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, where equals share the mean of theirs."""
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    array = np.asarray(values)
    return [float(np.sum(array < value) + np.sum(array <= value)) for value in array]


def _predicted(model: Mapping[str, Any]) -> dict[str, Any]:
    graph, cost = _problem(model)
    schedules = [(_schedule(entry), entry) for entry in model["schedules"]]
    found = calibrate(
        graph, cost, [(s, entry["measured_us"]) for s, entry in schedules if entry["calibrates"]]
    )
    others = [
        (s, float(entry["measured_us"])) for s, entry in schedules if not entry["calibrates"]
    ]
    measured_us = [us for _, us in others]
    kinds = {"alone": Contention(), "typical": TYPICAL, "calibrated": found}
    result = {}
    for kind, contention in kinds.items():
        contended = replace(cost, contention=contention)
        predicted_us = [simulate(graph, contended, s).makespan_us for s, _ in others]
        result[kind] = {
            "mean_absolute_error": float(
                np.mean(np.abs(np.array(predicted_us) / np.array(measured_us) - 1))
            ),
            "rank_correlation": rank_correlation(predicted_us, measured_us),
            "predicted_us": predicted_us,
        }
    contention_fields = dataclasses.asdict(found)
    return {"contention": contention_fields, "measured_us": measured_us, "predictions": result}


def _problem(model: Mapping[str, Any]) -> tuple[OperatorGraph, TableCost]:
    chains = model["chains"]
    graph = OperatorGraph(
        tuple(Operator(f"chain_{index}", "chain") for index in range(len(chains))),
        tuple(Edge(u, v, f"tensor_{u}_{v}", 0) for u, v in model["edges"]),
    )
    return graph, TableCost(tuple(OperatorCost(us, sm_share=share) for us, share in chains))


def _schedule(entry: Mapping[str, Any]) -> Schedule:
    pairs = zip(entry["order"], entry["streams"], strict=True)
    return Schedule(tuple(Slot(chain, Placement(_GPU, stream)) for chain, stream in pairs))


if __name__ == "__main__":
    main()
