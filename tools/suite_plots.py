"""Draw what the benchmark suite measured.

python tools/suite_plots.py DIR/suite.json --out docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsched_runtime.errors import OnnxschedError, UsageError
from onnxsched_runtime.files import written_whole
from tools.suite_table import COLUMNS, fastest, grouped, reference_column

_COLORS = (
    "#9aa0a6", "#5f6b7a", "#e8710a", "#a8c7fa", "#1a73e8", "#00695c", "#34a853", "#b80672",
)  # fmt: skip
"""One a column of the table, in its order."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the results and write one SVG a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="suite.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    options = parser.parse_args(arguments)
    try:
        for path in draw(_read(options.results), options.out):
            print(path)
    except OnnxschedError as error:
        sys.exit(str(error))


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if not grouped(report):
            raise UsageError(f"'{path}' holds no measured arm; run tools/suite.py first.")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"'{path}' is no result of the suite ({error}); give another.") from error
    return report


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `suite-bars.svg`, `suite-batches.svg` and `suite-prediction.svg` to a folder.

    A figure that nothing was measured for is left out.

    Args:
        report: The content of `suite.json`.
        folder: Made if it is not there.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (
        ("suite-bars", _bars(report)),
        ("suite-batches", _batches(report)),
        ("suite-prediction", _predictions(report)),
    ):
        if figure is None:
            continue
        path = folder / f"{name}.svg"
        with written_whole(path) as draft:  # no date: equal results make equal files
            figure.savefig(draft, format="svg", bbox_inches="tight", metadata={"Date": None})
        written.append(path)
    return written


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure without a display, and its axes side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "suite"  # ids that do not change from run to run
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", linewidth=0.4)
        ax.set_axisbelow(True)
    return figure, list(axes)


def _double(set_scale: Any, axis: Any) -> None:
    """Make an axis logarithmic in powers of two, written as plain numbers."""
    set_scale("log", base=2)
    axis.set_major_formatter("{x:g}")


def _relative(arms: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Time of the fastest of some arms over that of the reference in the same rounds."""
    found = fastest(arms, names)
    return None if found is None else 1 / found["ratio"]["value"]


def _bars(report: Mapping[str, Any]) -> Any:
    """Relative times at the smallest batch of each model, as grouped bars."""
    groups: dict[str, dict[str, Any]] = {}
    for (model, *_), arms in sorted(grouped(report).items(), key=lambda item: item[0][1]):
        groups.setdefault(model, arms)
    figure, (ax,) = _figure(1, max(6.0, 1.4 * len(groups)), 4.0)
    width = 0.8 / len(COLUMNS)
    for number, (label, names) in enumerate(COLUMNS.items()):
        heights = [_relative(arms, names) for arms in groups.values()]
        places = [i + (number - (len(COLUMNS) - 1) / 2) * width for i in range(len(groups))]
        drawn = [(x, y) for x, y in zip(places, heights, strict=True) if y is not None]
        if drawn:
            rises = [y - 1 for _, y in drawn]  # from the reference: on this axis 0 is far away
            at = [x for x, _ in drawn]
            ax.bar(at, rises, width, bottom=1, label=label, color=_COLORS[number])
    ax.axhline(1.0, color="black", linewidth=0.8)
    _double(ax.set_yscale, ax.yaxis)
    ax.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    ax.set_ylabel(f"time over {reference_column(report)} (less is better)")
    ax.legend(ncols=4, fontsize="small", frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _batches(report: Mapping[str, Any]) -> Any:
    """Relative times over the batch, one panel a model of several batches; None without any."""
    sweeps: dict[str, dict[int, dict[str, Any]]] = {}
    for (model, batch, *_), arms in grouped(report).items():
        sweeps.setdefault(model, {})[batch] = arms
    sweeps = {model: by for model, by in sweeps.items() if len(by) > 1}
    if not sweeps:
        return None
    figure, axes = _figure(len(sweeps), 4.0 * len(sweeps), 3.6)
    for ax, (model, by_batch) in zip(axes, sweeps.items(), strict=True):
        for number, (label, names) in enumerate(COLUMNS.items()):
            points = [(batch, _relative(arms, names)) for batch, arms in sorted(by_batch.items())]
            drawn = [(x, y) for x, y in points if y is not None]
            if drawn:
                ax.plot(*zip(*drawn, strict=True), "o-", label=label, color=_COLORS[number])
        _double(ax.set_xscale, ax.xaxis)
        _double(ax.set_yscale, ax.yaxis)
        ax.set_title(model)
        ax.set_xlabel("batch")
    axes[0].set_ylabel(f"time over {reference_column(report)}")
    axes[-1].legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _predictions(report: Mapping[str, Any]) -> Any:
    """Predicted against tried or measured times of every candidate; None without any."""
    points: dict[str, set[tuple[float, float]]] = {}
    for arms in grouped(report).values():
        for entry in arms.values():
            for candidate in entry.get("alternatives", ()):
                taken_us = candidate["tried_us"] or candidate["measured_us"]
                if taken_us:
                    pair = (candidate["predicted_us"], taken_us)
                    points.setdefault(candidate["policy"], set()).add(pair)
    if not points:
        return None
    figure, (ax,) = _figure(1, 5.0, 4.5)
    for policy, pairs in sorted(points.items()):
        ax.scatter(*zip(*sorted(pairs), strict=True), s=12, label=policy, alpha=0.7)
    ends = [value for pairs in points.values() for pair in pairs for value in pair]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("predicted (us)")
    ax.set_ylabel("measured (us)")
    ax.legend(fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    main()
