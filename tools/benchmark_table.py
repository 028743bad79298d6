"""Make the tables of README.md and docs/benchmarks/README.md from the suite's committed results.

python tools/benchmark_table.py            # prints that of README.md
python tools/benchmark_table.py --write    # puts all where they belong
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.suite_table import COLUMNS, costs, fastest, grouped, medians, policies

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "h200-suite.json"
_HEADS = (
    "model", "torch.compile", "ORT's CUDA graph", "ORT's best", "**schedule**",
    "over ORT's CUDA graph", "over ORT's best", "over torch", "policy/streams",
)  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The table in Markdown, of batch 1, with what it was measured on."""
    lines = [f"| {' | '.join(_HEADS)} |", "| --- |" + " ---: |" * (len(_HEADS) - 2) + " --- |"]
    first = report["date"].split(",")[0]
    dates: tuple[set[str], set[str]] = (set(), set())
    for (model, batch, *_), arms in grouped(report).items():
        if batch != 1 or "auto" not in arms:
            continue
        ours, torch = arms["auto"], fastest(arms, COLUMNS["torch.compile"])
        best = fastest(arms, COLUMNS["ORT best"])
        for found, when in zip(((ours,), (torch, best)), dates, strict=True):
            when.update(entry.get("date", first) for entry in found if entry is not None)
        cells = [
            _us(torch), f"{ours['reference']['median_us']:.0f}", _us(best),
            f"**{_us(ours)}**", f"**{ours['ratio']['value']:.2f}x**", _over(ours, best),
            _over(ours, torch), f"{ours['policy']}/{ours['streams']}",
        ]  # fmt: skip
        lines.append(f"| {model} | {' | '.join(cells)} |")
    environment = report["environment"]
    ours_on, peers_on = (", ".join(sorted(when)) for when in dates)
    measured = f"{ours_on} (peers: {peers_on})"
    return "\n".join([
        *lines,
        "",
        f"Microseconds on the device, medians of interleaved rounds; {environment['device']}, "
        f"{measured}, batch 1, float32 with TF32 allowed, onnxruntime "
        f"{environment['onnxruntime']}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, "
        f"torch {environment['torch']}. ORT's best is its fastest variant in one stream; ratios "
        "to it and to torch are of ratios to ORT's CUDA graph, each from one run, not of the "
        "times here. Empty is what was not measured. From "
        "[h200-suite.json](docs/benchmarks/h200-suite.json).",
        "",
    ])  # fmt: skip


def _us(entry: Any) -> str:
    return "" if entry is None else f"{entry['time']['median_us']:.0f}"


def _over(ours: Any, other: Any) -> str:
    value = None if other is None else ours["ratio"]["value"] / other["ratio"]["value"]
    return "" if value is None else f"{value:.2f}x"


TABLES: Mapping[Path, Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    ROOT / "README.md": {"benchmark table": table},
    RESULTS.parent / "README.md": {
        "suite table": medians, "cost table": costs, "policy table": policies,
    },
}  # fmt: skip
"""The tables of each page by the name that their markers have."""


def with_tables(page: Path, report: Mapping[str, Any]) -> str:
    """A page of `TABLES` with what stands between its markers made anew."""
    text = page.read_text()
    for name, make in TABLES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + make(report) + end + tail
    return text


def main() -> None:
    """Print the README's table, or write all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into both pages")
    report = json.loads(RESULTS.read_text())
    if not parser.parse_args().write:
        print(table(report), end="")
        return
    for page in TABLES:
        page.write_text(with_tables(page, report))


if __name__ == "__main__":
    main()
