"""Plots of the simulations of `tools/device_study.py`, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tools.device_study import by_value

_LABELS = {
    "devices": "devices",
    "operators": "operators, 2 edges each",
    "edges": "edges of 200 operators",
    "layers": "layers",
    "ratio": "communication to computation",
    "duration": "median us, 2 devices, measured link",
    "size": "operators on 8 devices",
}


def plot_study(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the speed-up over one stream for each sweep, and CPU seconds over the size.

    Schedules of one device are dashed.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}):
        figure = Figure(figsize=(14, 6.5), layout="constrained")
        grid = figure.subplots(2, 4).flat
        for axes, (sweep, label) in zip(grid, _LABELS.items(), strict=False):
            _draw(axes, by_value(results, sweep, "speedup"))
            axes.set_xlabel(label)
            axes.set_ylabel("speed-up over one stream")
            axes.set_ylim(bottom=0)
        *_, last = figure.axes
        _draw(last, by_value(results, "size", "cpu_s"))
        last.set_xlabel(_LABELS["size"])
        last.set_ylabel("CPU seconds to schedule")
        last.set_yscale("log")
        lines, labels = last.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside right center", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Any, means: Mapping[float, Mapping[str, float]]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(means), [f"{value:g}" for value in means])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    names = {"ios": "C3", "heft": "C0", "search": "C1", "hios-lp": "C2", "hios-mr": "C4"}
    for label in next(iter(means.values()), ()):
        name = label.removesuffix(" alone")
        axes.plot(
            list(means), [of_policy[label] for of_policy in means.values()],
            color=names[name], label=label, marker=".", linestyle="-" if name == label else "--",
        )  # fmt: skip
