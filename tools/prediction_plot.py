"""Draw predicted against measured times of schedules as an SVG.

python tools/prediction_plot.py predictions.json --out docs/benchmarks/h200-contention.svg

The predictions are what `tools/contention_report.py` writes: for each of `models` its
`measured_us`, and for every kind of prediction in `predictions` its `predicted_us` in the same
order, its `mean_absolute_error` and its `rank_correlation`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Read predictions and write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    options = parser.parse_args(arguments)
    try:
        draw(json.loads(options.predictions.read_text()), options.out)
    except (OSError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"'{options.predictions}' can't be drawn to '{options.out}' ({error}).")


def draw(predicted: Mapping[str, Any], path: Path) -> None:
    """Draw a column for each model, a colour for each kind of prediction. Deterministic.

    Raises:
        ValueError: There is no model.
        OSError: The file can't be written.
    """
    models = predicted["models"]
    if not models:
        raise ValueError("it holds no model")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prediction", "font.size": 9}):
        figure = Figure(figsize=(3.6 * len(models), 3.9), layout="constrained")
        columns = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (name, model) in zip(columns, models.items(), strict=True):
            _scatter(axes, model)
            axes.set_title(name)
            axes.set_xlabel("measured (us)")
        columns[0].set_ylabel("predicted (us)")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _scatter(axes: Any, model: Mapping[str, Any]) -> None:
    measured_us = model["measured_us"]
    ends_us = (min(measured_us), max(measured_us))
    axes.plot(ends_us, ends_us, color="0.7", linewidth=1)
    for kind, found in model["predictions"].items():
        error, correlation = found["mean_absolute_error"], found["rank_correlation"]
        label = f"{kind}: {100 * error:.1f} %, {correlation:.3f}"
        axes.scatter(measured_us, found["predicted_us"], s=9, label=label)
    axes.legend(frameon=False, title="mean error, rank correlation", loc="upper left")


if __name__ == "__main__":
    main()
