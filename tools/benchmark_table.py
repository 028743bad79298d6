"""Make the README's table from the suite's committed results.

python tools/benchmark_table.py            # prints it
python tools/benchmark_table.py --write    # puts it into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.suite_table import COLUMNS, fastest, grouped

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "h200-suite.json"
BEGIN, END = "<!-- benchmark table: begin -->\n", "<!-- benchmark table: end -->\n"
_HEADS = (
    "model", "torch.compile", "ORT's CUDA graph", "ORT's best", "**schedule**",
    "over ORT's CUDA graph", "over ORT's best", "over torch", "policy/streams",
)  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The table in Markdown, of batch 1, with what it was measured on."""
    lines = [f"| {' | '.join(_HEADS)} |", "| --- |" + " ---: |" * (len(_HEADS) - 2) + " --- |"]
    old, dates = [], set()
    for (model, batch, *_), arms in grouped(report).items():
        if batch != 1 or "auto" not in arms:
            continue
        ours, torch = arms["auto"], fastest(arms, COLUMNS["torch.compile"])
        best = fastest(arms, COLUMNS["ORT best"])
        if "date" in ours:
            dates.add(ours["date"])
        else:
            old.append(model)
        cells = [
            _us(torch), f"{ours['reference']['median_us']:.0f}", _us(best),
            f"**{_us(ours)}**", f"**{ours['ratio']['value']:.2f}x**", _over(ours, best),
            _over(ours, torch), f"{ours['policy']}/{ours['streams']}",
        ]  # fmt: skip
        lines.append(f"| {model} | {' | '.join(cells)} |")
    environment, earlier = report["environment"], report["date"].split(",")[0]
    measured = f"{', '.join(sorted(dates))} ({', '.join(['peers', *old])}: {earlier})"
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


def with_table(readme: str, content: str) -> str:
    """The README with the table between its markers replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + content + END + tail


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    content = table(json.loads(RESULTS.read_text()))
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(), content))
    else:
        print(content, end="")


if __name__ == "__main__":
    main()
