"""Make the README's table from the committed result files, the later ones over the earlier.

python tools/benchmark_table.py            # prints it
python tools/benchmark_table.py --write    # puts it into README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = [
    ROOT / "docs" / "benchmarks" / name
    for name in ("h200-zoo.json", "h200-variants.json", "h200-defaults.json")
]
BEGIN, END = "<!-- benchmark table: begin -->\n", "<!-- benchmark table: end -->\n"


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, with what it was measured on."""
    report, environment = reports[-1], reports[-1]["environment"]
    models = {name: model for found in reports for name, model in found["models"].items()}
    sources = ", ".join(f"[{p.name}](docs/benchmarks/{p.name})" for p in RESULTS)
    lines = [
        "| model | plain ORT | ORT, its own CUDA graph | one stream | **schedule** | over ORT's "
        "CUDA graph | policy/streams | variant |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, model in models.items():
        arms, ratios = model["bench"]["arms"], model["bench"]["ratios"]
        times = [arms[arm]["device"]["median_us"] for arm in ARMS]
        ratio = ratios["ort-graph"]
        cells = [f"{time:.0f}" for time in times[:-1]]
        rewrite = model.get("rewrite", "none")  # which older results do not have
        variant = model["variant"] if rewrite == "none" else f"{model['variant']}, {rewrite}"
        lines.append(
            f"| {name} | {' | '.join(cells)} | **{times[-1]:.0f}** | **{ratio['value']:.2f}x** "
            f"({ratio['low']:.2f}-{ratio['high']:.2f}) | {model['policy']}/{model['streams']} | "
            f"{variant} |"
        )
    lines += [
        "",
        f"Microseconds on the device, medians of interleaved rounds; {environment['device']}, "
        f"{report['date']}, batch 1, float32 with TF32 allowed (or half precision, over "
        f"ORT in float32), onnxruntime "
        f"{environment['onnxruntime']}, CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, "
        f"torch {environment['torch']}. In brackets the 95 % interval. From "
        f"{sources}.",
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
    content = table([json.loads(path.read_text()) for path in RESULTS])
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(), content))
    else:
        print(content, end="")


if __name__ == "__main__":
    main()
