"""Put results of the benchmark suite into the committed ones.

    python -m tools.suite_merge DIR/suite.json ...

What was measured again replaces what was there; each result gets the date of its file. What
failed is left out and said.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsched_runtime.files import written_whole
from tools.benchmark_table import RESULTS
from tools.suite import require_same_machine

_KEY = ("model", "batch", "image", "sequence", "arm")


def merged(report: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A report with what another has measured, of each model and size after what is there.

    Raises:
        UsageError: The other comes from another machine.
    """
    require_same_machine(report["environment"], other["environment"])
    results = list(report["results"])
    for entry in other["results"]:
        if entry["error"] is not None:
            continue
        dated = {**entry, "date": other["date"]}
        same = [i for i, known in enumerate(results) if _key(known) == _key(entry)]
        near = [i for i, known in enumerate(results) if _key(known)[:-1] == _key(entry)[:-1]]
        at = same[0] if same else (near or [len(results) - 1])[-1] + 1
        results[at : at + len(same)] = [dated]
    return {**report, "results": results}


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in _KEY)


def main() -> None:
    """Merge the files of the command line, and say what was left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what tools/suite.py wrote")
    report = json.loads(RESULTS.read_text())
    for path in parser.parse_args().files:
        other = json.loads(path.read_text())
        report = merged(report, other)
        for entry in other["results"]:
            if entry["error"] is not None:
                print(f"Left out: {entry['model']} {entry['batch']}, {entry['arm']}.")
    with written_whole(RESULTS) as draft:
        draft.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
