"""The optimality gap: its graphs, its sums, and the table made of them."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import networkx as nx
import pytest

from onnxsched.policies import POLICIES
from tools.optimality_gap import (
    FAMILIES,
    STREAM_COUNTS,
    Comparison,
    main,
    problem,
    report,
    series_parallel,
    summary,
    table,
)

_BENCHMARKS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_have_the_size_asked_for_and_depend_on_the_seed_only(family: str) -> None:
    drawn = [problem(family, size, seed) for size in (2, 8, 16) for seed in range(5)]
    assert [len(graph) for graph, _ in drawn] == [size for size in (2, 8, 16) for _ in range(5)]
    assert drawn == [problem(family, size, seed) for size in (2, 8, 16) for seed in range(5)]
    assert len({repr(p) for p in drawn}) == len(drawn)
    assert all(cost.duration_us > 0 for _, costs in drawn for cost in costs.operators)


@pytest.mark.parametrize("seed", range(10))
def test_series_parallel_graphs_hold_no_n(seed: int) -> None:
    """An order is series-parallel where no four of it are an N (Valdes et al., 1982)."""
    links = series_parallel(random.Random(seed), 8)
    assert all(0 <= u < v < 8 for u, v in links)
    order = set(nx.transitive_closure_dag(nx.DiGraph(links)).edges)
    for a, b, c, d in permutations(range(8), 4):
        among = {pair for pair in order if {*pair} <= {a, b, c, d}}
        assert among != {(a, c), (b, c), (b, d)}


def test_a_summary_leaves_out_what_is_not_proven() -> None:
    comparisons = [
        Comparison("random", 8, 2, is_proven, {"good": good, "bad": bad})
        for is_proven, good, bad in [(True, 1.0, 1.5), (True, 1.25, 1.75), (False, 9.0, 9.0)]
    ]
    assert summary(comparisons) == {
        "problems": 3,
        "proven": 2,
        "policies": {
            "good": {"mean_ratio": 1.125, "worst_ratio": 1.25, "optimal_share": 0.5},
            "bad": {"mean_ratio": 1.625, "worst_ratio": 1.75, "optimal_share": 0.0},
        },
    }
    assert summary(comparisons[2:]) == {"problems": 1, "proven": 0, "policies": {}}


def test_the_table_has_a_dash_where_nothing_is_proven() -> None:
    comparisons = [
        Comparison("random", 8, stream_count, stream_count == 2, {"heft": 1.25})
        for stream_count in (2, 3)
    ]
    assert table(report(comparisons)).splitlines()[2:] == [
        "| heft | 1.250 | - | 1.250 | 1.250 | 0% |",
        "",
        "Optimum proven for 1 of 2 problems.",
    ]


@pytest.mark.skipif(
    find_spec("ortools") is None,
    reason="OR-Tools is not installed; it has no wheel for some Pythons and systems",
)
def test_the_command_compares_every_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gap.json"
    assert main(["--graphs", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert capsys.readouterr().out == table(results)
    assert list(results["all"]["policies"]) == list(POLICIES)
    assert list(results["by_streams"]) == [str(count) for count in STREAM_COUNTS]
    for of_policy in results["all"]["policies"].values():
        assert 1.0 <= of_policy["mean_ratio"] <= of_policy["worst_ratio"]


@pytest.mark.parametrize(
    "words", [["--graphs", "0"], ["--time-limit", "0"], ["--out", "no/such/gap.json"]], ids=str
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.endswith(".\n")
    assert printed.err.count("\n") == 1


def test_the_document_holds_the_table_of_the_committed_results() -> None:
    results = json.loads((_BENCHMARKS / "optimality-gap.json").read_text())
    assert table(results) in (_BENCHMARKS / "README.md").read_text()
