"""cuBLAS's variable: the first model of a process decides, and nobody else sees it afterwards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxsched_runtime import execution
from onnxsched_runtime.cuda import blas
from onnxsched_runtime.cuda.blas import keep_blas_workspace, release_blas_variable
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import ModelError
from onnxsched_runtime.load import load
from support.models import annotated, fork_join
from support.optimizing import saved

NAME = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has told cuBLAS nothing yet."""
    monkeypatch.setattr(blas, "_kept", None)
    monkeypatch.setattr(blas, "_is_set_here", False)
    monkeypatch.setattr(blas, "_is_read", False)
    monkeypatch.setenv(NAME, "")
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize(("kind", "value"), [("small", ":16:8"), ("full", ":32768:1"),
                                             (None, ":32768:1")])  # fmt: skip
def test_it_is_set_until_a_session_has_run(kind: str, value: str) -> None:
    keep_blas_workspace(kind)  # type: ignore[arg-type]
    assert os.environ[NAME] == value
    keep_blas_workspace()
    assert os.environ[NAME] == value
    release_blas_variable()
    assert NAME not in os.environ
    keep_blas_workspace()
    release_blas_variable()
    assert NAME not in os.environ


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, ":4096:2")
    keep_blas_workspace("small")
    release_blas_variable()
    keep_blas_workspace("full")
    assert os.environ[NAME] == ":4096:2"


def test_a_model_that_comes_too_late_is_told_so() -> None:
    keep_blas_workspace("small")
    release_blas_variable()
    keep_blas_workspace("small")
    with pytest.warns(RuntimeWarning, match="load it first, or set CUBLAS_WORKSPACE_CONFIG="):
        keep_blas_workspace("full")


def test_one_that_wants_less_is_not_told_anything() -> None:
    keep_blas_workspace("full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_blas_workspace("small")
        keep_blas_workspace()
        keep_blas_workspace("full")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """Loads a model for a GPU in vain; returns the variable as ONNX Runtime sees it meanwhile."""
    path = saved(annotated(fork_join(), (0, 1), device=Device("cuda")), tmp_path)
    found: list[str | None] = []

    def refuse(*_: object) -> None:
        found.append(os.environ.get(NAME))
        raise ModelError("planted")

    def loaded_in_vain() -> str | None:
        with pytest.raises(ModelError, match="planted"):
            load(path)
        return found[-1]

    monkeypatch.setattr(execution, "lower", refuse)
    return loaded_in_vain


def test_a_load_that_fails_takes_it_back_and_the_next_sets_it_again(
    seen: Callable[[], str | None],
) -> None:
    for _ in range(2):
        assert seen() == ":16:8"
        assert NAME not in os.environ
    keep_blas_workspace()
    assert os.environ[NAME] == ":16:8"  # cuBLAS may have read it
    release_blas_variable()
    assert seen() is None


def test_a_load_that_fails_leaves_what_an_earlier_one_needs(
    seen: Callable[[], str | None],
) -> None:
    keep_blas_workspace("full")
    assert seen() == os.environ[NAME] == ":32768:1"


def test_a_load_that_fails_leaves_what_the_user_has_set(
    seen: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, ":4096:2")
    assert seen() == os.environ[NAME] == ":4096:2"
