"""Plots of committed result files, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_QUANTITIES = (("cpu_s", "CPU seconds", 0.01), ("memory_mib", "MiB", 1.0))
"""Key, label, and what is drawn for less than it."""


def plot_scale(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report of `tools/scheduler_scale.py`: time above memory, a column for each family.

    Steps on the operators and on their chains have one colour, the latter dashed. Lines end
    where a step ran into its limit.
    """
    families = list(dict.fromkeys(result["family"] for result in report["results"]))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}):
        figure = Figure(figsize=(12, 6.5), layout="constrained")
        grid = figure.subplots(2, len(families), sharex=True, sharey="row", squeeze=False)
        for row, (key, label, least) in zip(grid, _QUANTITIES, strict=True):
            row[0].set_ylabel(label)
            for axes, family in zip(row, families, strict=True):
                results = [r for r in report["results"] if r["family"] == family]
                _draw(axes, results, key, least)
        for axes, family in zip(grid[0], families, strict=True):
            axes.set_title(family)
        for axes in grid[-1]:
            axes.set_xlabel("operators")
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside right center", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Any, results: list[Mapping[str, Any]], key: str, least: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    colours: dict[str, str] = {}
    for step in results[0]["steps"]:
        name = step.removesuffix(" on chains")
        colour = colours.setdefault(name, f"C{len(colours)}")
        done = [r for r in results if key in r["steps"][step]]
        axes.plot(
            [r["operators"] for r in done],
            [max(least, r["steps"][step][key]) for r in done],
            color=colour, label=step, marker=".", linestyle="-" if name == step else "--",
        )  # fmt: skip
