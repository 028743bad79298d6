"""Numbers in the README are those of a committed result file."""

from __future__ import annotations

import json
from pathlib import Path

from tools.benchmark_table import BEGIN, END, RESULTS, table, with_table

_README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_readme_holds_the_table_of_the_committed_results() -> None:
    content = table(json.loads(RESULTS.read_text()))
    readme = _README.read_text()
    assert BEGIN + content + END in readme
    assert with_table(readme, content) == readme


def test_a_result_file_names_its_machine_and_its_date() -> None:
    for path in RESULTS.parent.glob("*.json"):
        report = json.loads(path.read_text())
        assert report["environment"]["device"]
        assert report["environment"]["onnxruntime"]
        assert report["date"]
