"""The table of the benchmark suite, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, Sequence[str]] = {
    "torch eager": ("torch-eager",),
    "torch graph": ("torch-graph", "torch-graph-nhwc"),
    "torch.compile": (
        "torch-compile",
        "torch-compile-nhwc",
        "torch-compile-frozen",
        "torch-compile-frozen-nhwc",
        "torch-reduce-overhead",
        "torch-reduce-overhead-nhwc",
        "torch-max-autotune",
        "torch-max-autotune-nhwc",
    ),
    "ORT": ("ort",),
    "ORT graph": ("ort-graph",),
    "ORT best": ("ort-best",),
    "one stream": ("sequential",),
    "auto": ("auto",),
}
"""Of several arms a column shows the fastest."""


def table(report: Mapping[str, Any]) -> str:
    """All tables one after another, and what they were measured on."""
    tables = (medians(report), costs(report), policies(report))
    return "\n".join([*filter(None, tables), *_notes(report)]) + "\n"


def medians(report: Mapping[str, Any]) -> str:
    """One line a model and batch: medians in microseconds, then `auto` over the others.

    Only what was measured for some model has a column.
    How much faster `auto` is than torch is formed from both ratios to the reference, each from
    rounds of its own run.
    """
    over = f"over {reference_column(report)} | over best torch"
    reference = COLUMNS[reference_column(report)]
    measured = {name for arms in grouped(report).values() for name in arms}
    columns = {
        label: names
        for label, names in COLUMNS.items()
        if names == reference or measured.intersection(names)
    }
    lines = [
        f"| model | batch | {' | '.join(columns)} | {over} |",
        f"| --- | ---: |{' ---: |' * (len(columns) + 2)}",
    ]
    for (model, batch, *_), arms in grouped(report).items():
        cells = [_median(arms, names, reference) for names in columns.values()]
        ours, torch = arms.get("auto"), fastest(arms, _torch(arms))
        over_reference = _interval(ours["ratio"]) if ours else ""
        over_torch = _over(ours, torch) if ours and torch else ""
        lines.append(
            f"| {model} | {batch} | {' | '.join(cells)} | {over_reference} | {over_torch} |"
        )
    return "\n".join([*lines, ""])


def grouped(report: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What was measured, by model and size, then by arm."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in report["results"]:
        if entry["error"] is None:
            found.setdefault(size_of(entry), {})[entry["arm"]] = entry
    return found


def size_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """The model of a result, and its sizes."""
    return entry["model"], entry["batch"], entry["image"], entry["sequence"]


def _torch(arms: Mapping[str, Any]) -> list[str]:
    return [name for name in arms if name.startswith("torch-")]


def fastest(arms: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The arm with the shortest time; None where none was measured."""
    there = [arms[name] for name in names if name in arms]
    return min(there, key=lambda entry: entry["time"]["median_us"], default=None)


def _median(arms: Mapping[str, Any], names: Sequence[str], reference: Sequence[str]) -> str:
    """Of the fastest arm; the reference was measured at least beside `auto`."""
    entry = fastest(arms, names)
    if entry is not None:
        return f"{entry['time']['median_us']:.0f}"
    is_known = names == reference and "auto" in arms
    return f"{arms['auto']['reference']['median_us']:.0f}" if is_known else ""


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _over(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    value = ours["ratio"]["value"] / other["ratio"]["value"]
    return f"{value:.2f}x ({other['arm'].removeprefix('torch-')})"


def costs(report: Mapping[str, Any]) -> str:
    """What `auto` costs, and how near it is to what no schedule of its kernels is shorter than.

    Empty where it was not measured.
    """
    lines = []
    for (model, batch, *_), arms in grouped(report).items():
        ours, reference = arms.get("auto"), arms.get("ort-graph")
        if not ours or ours.get("sm_time_us") is None:
            continue
        bound_us = max(ours["critical_path_us"], ours["sm_time_us"])
        cells = [
            _megabytes(ours), _megabytes(reference), f"{ours['optimize_s']:.0f}",
            _number(ours["predicted_us"]), _number(ours["operator_sum_us"]),
            _number(ours["critical_path_us"]), _number(ours["sm_time_us"]),
            f"{ours['time']['median_us'] / bound_us:.2f}x" if bound_us else "",
        ]  # fmt: skip
        lines.append(f"| {model} | {batch} | {' | '.join(cells)} |")
    heads = [
        "auto MB", "ORT graph MB", "optimize s", "predicted", "sum", "longest way", "SM time",
        "over both",
    ]  # fmt: skip
    table = [f"| model | batch | {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * len(heads)}"]
    return "\n".join([*table, *lines, ""]) if lines else ""


def policies(report: Mapping[str, Any]) -> str:
    """How much longer each policy's fastest schedule took than the fastest of all.

    Empty where none was tried. All were tried in the process that made `auto`, on the same
    kernels, which suits comparing policies better than arms that each choose kernels for
    themselves.
    """
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for (model, batch, *_), arms in grouped(report).items():
        for entry in arms.get("auto", {}).get("alternatives", ()):
            if (tried_us := entry["tried_us"]) is not None:
                best = found.setdefault((model, batch), {})
                best[entry["policy"]] = min(tried_us, best.get(entry["policy"], tried_us))
    names = sorted({name for best in found.values() for name in best})
    lines = []
    for (model, batch), best in found.items():
        least_us = min(best.values())
        cells = [f"{best[name] / least_us:.2f}" if name in best else "" for name in names]
        lines.append(f"| {model} | {batch} | {' | '.join(cells)} |")
    head = [f"| model | batch | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    return "\n".join([*head, *lines, ""]) if lines else ""


def _megabytes(entry: Any) -> str:
    nbytes = None if entry is None else entry["memory_nbytes"]
    return "" if nbytes is None else f"{nbytes / 1e6:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def reference_column(report: Mapping[str, Any]) -> str:
    """What everything is compared with: the CPU has no graphs."""
    environment = report.get("environment", {})
    return "ORT graph" if "cuda" in environment else "ORT"


def _notes(report: Mapping[str, Any]) -> list[str]:
    environment = report.get("environment", {})
    versions = [f"{key} {environment[key]}" for key in ("onnxruntime", "torch", "cuda", "cudnn")
                if key in environment]  # fmt: skip
    notes = [
        f"Microseconds, medians of interleaved rounds; {environment.get('device', '')}, "
        f"{report.get('date', '')}, float32 with TF32 allowed, {', '.join(versions)}. In brackets "
        "the 95 % interval, or the fastest torch arm. SM time is each kernel's alone times the "
        "share of the multiprocessors that it covers."
    ]
    failed = [entry for entry in report["results"] if entry["error"]]
    if failed:
        notes += ["", "Not measured:", ""]
        notes += [f"- {e['model']} {e['batch']}, {e['arm']}: {e['error']}" for e in failed]
    return notes
