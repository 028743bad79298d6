"""Numbers in the README and on the page of benchmarks are those of a committed result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark_table import RESULTS, TABLES, with_tables


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.parent.name)
def test_a_page_holds_the_tables_of_the_committed_results(page: Path) -> None:
    for name in TABLES[page]:
        assert page.read_text().count(f"<!-- {name}: begin -->\n") == 1
        assert page.read_text().count(f"<!-- {name}: end -->\n") == 1
    assert with_tables(page, json.loads(RESULTS.read_text())) == page.read_text()


def test_a_result_file_names_its_machine_and_its_date() -> None:
    for path in RESULTS.parent.glob("*.json"):
        report = json.loads(path.read_text())
        assert report["environment"]["device"]
        assert report["environment"]["onnxruntime"]
        assert report["date"]
