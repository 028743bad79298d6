"""Put results of the benchmark suite into the committed ones.

    python -m tools.suite_merge DIR/suite.json ...

What was measured again replaces what was there; each result gets the date of its file. What
failed is left out and said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxsched_runtime.errors import UsageError
from tools.benchmark_table import RESULTS
from tools.suite import require_same_machine, save
from tools.suite_table import size_of


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
        near = [i for i, known in enumerate(results) if size_of(known) == size_of(entry)]
        same = [i for i in near if results[i]["arm"] == entry["arm"]]
        at = same[0] if same else (near or [len(results) - 1])[-1] + 1
        results[at : at + len(same)] = [dated]
    return {**report, "results": results}


def main() -> None:
    """Merge the files of the command line, and say what was left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what tools/suite.py wrote")
    report = json.loads(RESULTS.read_text())
    for path in parser.parse_args().files:
        try:
            other = json.loads(path.read_text())
            report = merged(report, other)
        except UsageError as error:
            sys.exit(str(error))
        except (OSError, KeyError, TypeError, ValueError):
            sys.exit(f"'{path}' is no result of the suite; give one that tools/suite.py wrote.")
        for entry in other["results"]:
            if entry["error"] is not None:
                print(f"Left out: {entry['model']} {entry['batch']}, {entry['arm']}.")
    save(report, RESULTS)


if __name__ == "__main__":
    main()
