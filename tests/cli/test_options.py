"""Numbers and places that make no sense are refused before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnxsched.cli import run
from support.optimizing import contents, workplace

_OPTIMIZE = ["optimize", "tiny.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize(
    "arguments",
    [
        [*_OPTIMIZE, "--seed", "-1"],
        [*_OPTIMIZE, "--streams", "1025"],
        [*_OPTIMIZE, "--budget", "nan"],
        [*_OPTIMIZE, "--budget", "-1"],
        [*_OPTIMIZE, "--shape", "input:99999999999999999999x3"],
        [*_OPTIMIZE, "--shape", "input:1x3x32x32", "--shape", "input:2x3x32x32"],
        [*_OPTIMIZE, "--json", "new.onnx"],
        [*_OPTIMIZE, "--json", "nowhere/result.json"],
        ["bench", "out.onnx", "--fail-under", "nan"],
        ["bench", "out.onnx", "--duration", "nan"],
        ["bench", "out.onnx", "--duration", "inf"],
        ["bench", "out.onnx", "--warmup", "-5"],
        ["bench", "out.onnx", "--throughput", "--duration", "-1"],
        ["bench", "out.onnx", "--iterations", "0"],
        ["run", "out.onnx", "--seed", "-1"],
        ["verify", "out.onnx", "tiny.onnx", "--seed", "-1"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_it_is_a_usage_error(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert contents(folder) == before


def test_json_goes_through_a_link_and_never_replaces_a_device(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    assert run(["inspect", str(folder / "out.onnx"), "--json", "link.json"]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "target.json").read_text().startswith("{")
    os.mkfifo(tmp_path / "pipe")
    assert run(["inspect", str(folder / "out.onnx"), "--json", "pipe"]) == 1
    assert "no regular file" in capsys.readouterr().err
    assert not (tmp_path / "pipe").is_file()
