"""The table and the figures of the benchmark suite, made from made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from support.suite import report, result
from tools.suite_plots import draw, main
from tools.suite_table import table

_SVG = "{http://www.w3.org/2000/svg}"


def test_the_table_shows_the_fastest_of_several_arms() -> None:
    lines = table(report()).splitlines()
    assert lines[0].split(" | ")[-2:] == ["over ORT graph", "over best torch |"]
    assert lines[2] == (
        "| googlenet | 1 | 500 | 150 | 300 | 200 | 100 | 2.00x (1.99-2.01) "
        "| 1.50x (compile-nhwc) |"
    )
    assert [line.split(" | ")[:2] for line in lines[2:5]] == [
        ["| googlenet", "1"],
        ["| googlenet", "8"],
        ["| bert", "1"],
    ]
    assert {line.count("|") for line in lines[:5]} == {lines[0].count("|")}


def test_the_reference_needs_no_arm_of_its_own() -> None:
    content = report()
    content["results"] = [r for r in content["results"] if r["arm"] != "ort-graph"]
    ours = next(entry for entry in content["results"] if entry["arm"] == "auto")
    ours["reference"]["median_us"] = 234.5
    assert first_row(content)["ORT graph"] == "234"
    del content["environment"]["cuda"]
    assert (first_row(content)["ORT"], "ORT graph" in first_row(content)) == ("300", False)


def first_row(content: dict[str, Any]) -> dict[str, str]:
    heads, _, cells, *_ = (line.split(" | ") for line in table(content).splitlines())
    return dict(zip(heads, cells, strict=True))


def test_a_second_table_says_what_auto_costs_and_how_near_its_bounds_it_is() -> None:
    content = report()
    ours = next(entry for entry in content["results"] if entry["arm"] == "auto")
    bounds = {"operator_sum_us": 300.0, "critical_path_us": 80.0, "sm_time_us": 50.0}
    ours |= {"optimize_s": 12.3, "predicted_us": 95.0, "memory_nbytes": 5_000_000, **bounds}
    lines = table(content).splitlines()
    [row] = [line for line in lines if " 1.25x |" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["googlenet", "1", "5"]
    assert cells[4:] == ["12", "95", "300", "80", "50", "1.25x"]


def test_a_third_table_compares_what_policies_were_tried_with() -> None:
    content = report()
    ours = next(entry for entry in content["results"] if entry["arm"] == "auto")
    tried = [("opara", 110.0), ("opara", 105.0), ("search", 100.0), ("ios", None)]
    ours["alternatives"] = [
        {"policy": policy, "tried_us": tried_us, "predicted_us": 1.0, "measured_us": None}
        for policy, tried_us in tried
    ]
    lines = table(content).splitlines()
    place = lines.index("| model | batch | opara | search |")
    assert lines[place + 2 : place + 4] == ["| googlenet | 1 | 1.05 | 1.00 |", ""]


def test_the_table_names_the_machine_and_what_failed() -> None:
    text = table(report())
    assert "a GPU, 2000-01-01" in text
    assert "- bert 1, torch-max-autotune: The step 'measure' was not finished in 300 s." in text


def test_a_table_of_nothing_measured_is_only_its_head() -> None:
    lines = table({"results": []}).splitlines()
    assert lines[0].startswith("| model")
    assert lines[2] == ""


def test_figures_are_well_formed_and_equal_for_equal_results(tmp_path: Path) -> None:
    paths = draw(report(), tmp_path / "one")
    assert [p.name for p in paths] == [
        "suite-bars.svg", "suite-batches.svg", "suite-prediction.svg",
    ]  # fmt: skip
    for path, again in zip(paths, draw(report(), tmp_path / "two"), strict=True):
        assert ElementTree.parse(path).getroot().tag == f"{_SVG}svg"
        assert path.read_bytes() == again.read_bytes()


def test_figures_without_content_are_left_out(tmp_path: Path) -> None:
    few = {**report(), "results": [result("bert", 1, "ort")]}
    assert [path.name for path in draw(few, tmp_path)] == ["suite-bars.svg"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps({"results": []})])
def test_what_is_no_result_ends_in_a_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "suite.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main([str(path), "--out", str(tmp_path)])
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
