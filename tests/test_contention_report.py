"""What is made of measured schedules: predictions, their table and their figure."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import contention_report, prediction_plot

BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
MEASUREMENT = BENCHMARKS / "h200-contention.json"


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "predictions.json"
    contention_report.main([str(MEASUREMENT), "--out", str(path)])
    return path


def test_only_schedules_that_did_not_calibrate_are_predicted(predictions: Path) -> None:
    measured = json.loads(MEASUREMENT.read_text())["models"]
    for name, model in json.loads(predictions.read_text())["models"].items():
        others = [s["measured_us"] for s in measured[name]["schedules"] if not s["calibrates"]]
        assert model["measured_us"] == others
        for found in model["predictions"].values():
            assert len(found["predicted_us"]) == len(others)
        assert len(others) < len(measured[name]["schedules"])


def test_the_table_of_the_documents_is_that_of_the_measurement(predictions: Path) -> None:
    table = contention_report.table(json.loads(predictions.read_text()))
    begin, end = "<!-- contention table: begin -->\n", "\n<!-- contention table: end -->"
    assert begin + table + end in (BENCHMARKS / "README.md").read_text()


def test_the_figure_has_a_point_for_each_prediction(predictions: Path, tmp_path: Path) -> None:
    path, again = tmp_path / "plot.svg", tmp_path / "again.svg"
    prediction_plot.main([str(predictions), "--out", str(path)])
    models = json.loads(predictions.read_text())["models"]
    expected = sum(
        len(found["predicted_us"]) + 1  # The legend has one as well.
        for model in models.values()
        for found in model["predictions"].values()
    )
    groups = ElementTree.parse(path).iterfind(".//{*}g[@id]")
    scatters = [group for group in groups if group.get("id", "").startswith("PathCollection")]
    assert sum(len(list(group.iterfind(".//{*}use"))) for group in scatters) == expected
    prediction_plot.main([str(predictions), "--out", str(again)])
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"models": {}, "date": ""}'])
def test_what_is_no_measurement_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "measurement.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="is no measurement of schedules"):
        contention_report.main([str(path), "--out", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"models": {}}', '{"models": {"m": {}}}'])
def test_what_are_no_predictions_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="can't be drawn"):
        prediction_plot.main([str(path), "--out", str(tmp_path / "plot.svg")])
    assert not (tmp_path / "plot.svg").exists()


def test_rank_correlation_sees_only_the_order() -> None:
    assert contention_report.rank_correlation([1, 2, 3, 9], [1, 4, 9, 10]) == pytest.approx(1.0)
    assert contention_report.rank_correlation([1, 2, 3], [5, 4, -3]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert contention_report.rank_correlation([1, 2, 2, 7], [1, 2, 3, 4]) == pytest.approx(
        4.5 / (4.5 * 5.0) ** 0.5
    )
