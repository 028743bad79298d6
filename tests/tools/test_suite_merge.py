"""Results of a later run among those that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from onnxsched_runtime.errors import UsageError
from support.suite import report
from tools import suite_merge
from tools.suite_merge import merged


def test_what_was_measured_again_replaces_what_was_there_and_gets_its_own_date() -> None:
    known, other = report(), report()
    other["date"] = "2027-01-01"
    again = next(e for e in other["results"] if (e["model"], e["arm"]) == ("googlenet", "auto"))
    again["time"]["median_us"] = 77.0
    other["results"] = [again]
    found = merged(known, other)
    assert found["date"] == known["date"]
    expected = {**again, "date": "2027-01-01"}
    at = found["results"].index(expected)
    assert [e for i, e in enumerate(found["results"]) if i != at] == [
        e for i, e in enumerate(known["results"]) if i != at
    ]
    assert {k: v for k, v in known["results"][at].items() if k != "time"} == {
        k: v for k, v in again.items() if k != "time"
    }


def test_a_new_arm_comes_after_those_of_its_model_and_size() -> None:
    known, other = report(), report()
    new = {**known["results"][0], "arm": "opara"}
    other["results"] = [new]
    found = merged(known, other)["results"]
    assert len(found) == len(known["results"]) + 1
    place = next(i for i, entry in enumerate(found) if entry["arm"] == "opara")
    sizes = [(entry["model"], entry["batch"]) for entry in found]
    assert sizes[place - 1] == sizes[place] != sizes[place + 1]


def test_a_new_model_comes_last_and_what_failed_not_at_all() -> None:
    known, other = report(), report()
    first = known["results"][0]
    other["results"] = [{**first, "model": "new"}, {**first, "model": "bad", "error": "Why."}]
    found = merged(known, other)["results"]
    assert [entry["model"] for entry in found[len(known["results"]) :]] == ["new"]


def test_another_machine_is_refused_in_a_sentence() -> None:
    other = report()
    other["environment"] = {**other["environment"], "driver": "1.0"}
    with pytest.raises(UsageError, match=r"measured with driver .*, this machine has 1\.0; "):
        merged(report(), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no result of the suite; give one"),
        ("no JSON", "is no result of the suite; give one"),
        ("[]", "is no result of the suite; give one"),
        ('{"environment": {}}', "this machine has None; "),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence_and_changes_nothing(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, path = tmp_path / "results.json", tmp_path / "suite.json"
    results.write_text(json.dumps(report()))
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(suite_merge, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["suite_merge", str(path)])
    with pytest.raises(SystemExit, match=message):
        suite_merge.main()
    assert json.loads(results.read_text()) == report()
