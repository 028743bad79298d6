"""The wheel holds both packages, all of them, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIST_INFO = f"onnxsched-{PROJECT['version']}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout; with what is installed, where that is enough."""
    folder = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("hatchling"):
        command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    else:
        command = ["build", "--wheel", "--outdir", str(folder), "."]
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_runs_everywhere(wheel: Path) -> None:
    assert wheel.name == f"onnxsched-{PROJECT['version']}-py3-none-any.whl"


def test_two_packages_and_their_description_are_all_there_is(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"onnxsched", "onnxsched_runtime", DIST_INFO}


def test_every_module_is_in_it_and_no_other_file(names: set[str]) -> None:
    expected = {
        path.relative_to(folder).as_posix()
        for folder, package in ((ROOT, "onnxsched"), (ROOT / "runtime", "onnxsched_runtime"))
        for path in (folder / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {"onnxsched/py.typed", "onnxsched_runtime/py.typed"} <= expected
    assert {name for name in names if not name.startswith(DIST_INFO)} == expected


def test_command_and_licence_are_in_it(wheel: Path, names: set[str]) -> None:
    assert f"{DIST_INFO}/licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
        metadata = archive.read(f"{DIST_INFO}/METADATA").decode()
    assert "onnxsched = onnxsched.cli:main" in entry_points
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    for dependency in PROJECT["dependencies"]:
        name = dependency.partition(";")[0].partition(">")[0].strip()
        assert f"\nRequires-Dist: {name}" in metadata


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = (
        "import onnxsched.pipeline, onnxsched_runtime.load, sys; "
        "print(onnxsched.pipeline.__file__); print(onnxsched_runtime.load.__file__)"
    )
    for command, expected in (
        (["-m", "onnxsched", "--version"], f"{PROJECT['version']}\n"),
        (
            ["-c", script],
            f"{tmp_path}/onnxsched/pipeline.py\n{tmp_path}/onnxsched_runtime/load.py\n",
        ),
    ):
        run = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert (run.returncode, run.stdout) == (0, expected), run.stderr
