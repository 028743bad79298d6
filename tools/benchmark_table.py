"""Make the README's table from a committed result file.

python tools/benchmark_table.py            # prints it
python tools/benchmark_table.py --write    # puts it into README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "h200-zoo.json"
BEGIN, END = "<!-- benchmark table: begin -->\n", "<!-- benchmark table: end -->\n"


def table(report: dict[str, Any]) -> str:
    """The table in Markdown, with what it was measured on."""
    environment = report["environment"]
    lines = [
        "| model | plain ORT | ORT, its own CUDA graph | one stream | **schedule** | over ORT's "
        "CUDA graph | policy/streams | variant |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, model in report["models"].items():
        arms, ratios = model["bench"]["arms"], model["bench"]["ratios"]
        times = [arms[arm]["device"]["median_us"] for arm in ARMS]
        ratio = ratios["ort-graph"]
        cells = [f"{time:.0f}" for time in times[:-1]]
        lines.append(
            f"| {name} | {' | '.join(cells)} | **{times[-1]:.0f}** | **{ratio['value']:.2f}x** "
            f"({ratio['low']:.2f}-{ratio['high']:.2f}) | {model['policy']}/{model['streams']} | "
            f"{model['variant']} |"
        )
    lines += [
        "",
        f"Microseconds on the device, medians of interleaved rounds; {environment['device']}, "
        f"{report['date']}, batch 1, float32 with TF32 allowed, onnxruntime "
        f"{environment['onnxruntime']}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, "
        f"torch {environment['torch']}. In brackets the 95 % interval. From "
        f"[{RESULTS.name}](docs/benchmarks/{RESULTS.name}).",
    ]
    return "\n".join(lines) + "\n"


ARMS = ("ort", "ort-graph", "sequential", "schedule")


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
