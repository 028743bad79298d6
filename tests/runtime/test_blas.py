"""cuBLAS's variable: the first model of a process decides, and nobody else sees it afterwards."""

from __future__ import annotations

import os
import warnings

import pytest

from onnxsched_runtime.cuda import blas
from onnxsched_runtime.cuda.blas import keep_blas_workspace, release_blas_variable

NAME = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has told cuBLAS nothing yet."""
    monkeypatch.setattr(blas, "_kept", None)
    monkeypatch.setattr(blas, "_is_set_here", False)
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
