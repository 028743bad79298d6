"""Streams that are closed, full or speak ASCII, Ctrl-C, and files that are not what they seem."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import onnxsched
from onnxsched import cli
from onnxsched.cli import dispatch
from onnxsched.inspection import inspect_model
from onnxsched_runtime.annotation import write_annotation
from onnxsched_runtime.arrays import read_array, write_arrays
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import AnnotationError, OnnxschedError, UsageError
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from support.models import annotated, annotation_of, diamond, model_of
from support.optimizing import saved

ROOT = Path(onnxsched.__file__).parent.parent
FULL = "onnxsched: The result can't be written to stdout (No space left on device).\n"
MISSING = "onnxsched: There is no file 'nope'; give the path of an ONNX model.\n"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands run: with one annotated model."""
    saved(annotated(diamond()), tmp_path, "s.onnx")
    return tmp_path


def shell(arguments: str, folder: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line with its redirections."""
    found = subprocess.run(
        f"'{sys.executable}' -m onnxsched {arguments}", shell=True, cwd=folder,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
            "CUDA_VISIBLE_DEVICES": "", **variables,
        },
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("redirected", "code"), [("s.onnx >&-", 0), ("nope 2>&-", 2), ("nope <&- >&- 2>&-", 2)]
)
def test_closed_streams_are_no_error(redirected: str, code: int, folder: Path) -> None:
    assert shell(f"inspect {redirected}", folder) == (code, "", "")


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "ended"),
    [
        ("inspect nope 2>/dev/full", (2, "", "")),
        ("inspect nope >/dev/full", (2, "", MISSING)),
        ("inspect s.onnx >/dev/full", (1, "", FULL)),
        ("strip s.onnx -o new.onnx >/dev/full", (1, "", FULL)),
        ("--help >/dev/full", (1, "", FULL)),
        ("--help >/dev/full 2>/dev/full", (1, "", "")),
    ],
)
def test_full_streams_end_in_one_sentence(
    command: str, ended: tuple[int, str, str], unbuffered: str, folder: Path
) -> None:
    assert shell(command, folder, PYTHONUNBUFFERED=unbuffered) == ended


def test_another_files_error_is_not_taken_for_stdouts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dispatch, "app", failing)
    assert cli.run(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("onnxsched: Unforeseen OSError: ")


def test_names_that_the_terminal_cannot_show_are_escaped(folder: Path) -> None:
    model = diamond()
    model.graph.node[0].name = "né"
    write_annotation(model, replace(annotation_of(model), host_reasons={"né": "über"}))
    saved(model, folder, "u.onnx")
    code, stdout, stderr = shell("inspect u.onnx", folder, PYTHONIOENCODING="ascii")
    assert (code, stderr) == (0, "")
    assert r"n\xe9: \xfcber" in stdout


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
@pytest.mark.parametrize(
    ("signal", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "onnxsched: Interrupted; nothing was written.\n"),
        (SystemExit(143), 143, ""),
    ],
)
def test_a_signal_that_an_extension_wraps_is_what_counts(
    signal: BaseException,
    code: int,
    said: str,
    link: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def importing(*_: Any, **__: Any) -> None:
        error = ImportError("initialization failed")
        setattr(error, link, signal)
        raise error

    monkeypatch.setattr(dispatch, "app", importing)
    assert cli.run(["doctor"]) == code
    assert capsys.readouterr().err == said


def test_a_circle_of_reasons_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__context__ = other, one

    def failing(*_: Any, **__: Any) -> None:
        raise one

    monkeypatch.setattr(dispatch, "app", failing)
    assert cli.run(["doctor"]) == 1
    assert "Unforeseen RuntimeError: one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 no archive",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (2,".ljust(200),
        b"\x80\x04pickled",
        b"",
    ],
)
def test_an_input_that_is_no_array_is_wrong_usage(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "input.npy"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"is no \.npy file; save input 'x' with numpy"):
        read_array("x", file)


def test_an_input_with_a_name_no_file_can_have_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        read_array("x", tmp_path / ("n" * 300))


def test_an_array_of_objects_is_told_how_to_be_saved(tmp_path: Path) -> None:
    file = tmp_path / "input.npy"
    np.save(file, np.array(["a", "b"], object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"strings as `array\.astype\(str\)`\.$"):
        read_array("x", file)


def test_outputs_are_all_written_or_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1))
    (tmp_path / "b.npy").mkdir()
    with pytest.raises(OnnxschedError, match=r"\('b\.npy' is a folder there\)"):
        write_arrays({"a": np.ones(1), "b": np.ones(1)}, tmp_path)
    assert np.load(tmp_path / "a.npy") == [0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npy", "b.npy"]


texts = st.text().filter(lambda text: not text.endswith("\0"))  # where numpy pads texts with it


@given(value=arrays.arrays(object, arrays.array_shapes(min_dims=0, min_side=0), elements=texts))
def test_texts_are_read_as_they_were_written(value: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_arrays({"x": value}, Path(folder))
        found = read_array("x", Path(folder, "x.npy"))
    assert (found.shape, found.tolist()) == (value.shape, value.tolist())


def test_a_written_text_is_an_input_again(folder: Path) -> None:
    model = model_of("(string[2] x) => (string[2] y) { y = Identity(x) }")
    saved(annotated(model), folder, "text.onnx")
    np.save(folder / "x.npy", np.array(["a", "longer"]))
    for file in ("x.npy", "results/y.npy"):
        command = f"run text.onnx --input x={file} --output-dir results"
        assert shell(command, folder)[::2] == (0, "")
        assert np.load(folder / "results" / "y.npy").tolist() == ["a", "longer"]


@pytest.mark.parametrize("value", [{"a": 1.0}, [{1: 0.5}], None])
def test_outputs_that_are_no_arrays_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^Output 'y' holds a map or nothing, .*; leave out .*"):
        write_arrays({"x": np.zeros(1), "y": value}, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("damage", [[], None, {"n": None}, {"n": ["x", None]}, {"n": [1]}])
def test_damaged_times_are_refused_by_inspect(damage: Any, tmp_path: Path) -> None:
    model = diamond()
    write_annotation(model, replace(annotation_of(model), details={"operators": damage}))
    with pytest.raises(AnnotationError, match=r"damaged \(.*\); run `onnxsched optimize` again"):
        inspect_model(saved(model, tmp_path))


def test_onnxruntime_says_nothing_beside_our_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_of("(float[4] x, int64[1] s) => (float[n] y) { y = Reshape(x, s) }")
    with (
        OrtSession(saved(model, tmp_path), SessionSettings(Device("cpu"))) as session,
        pytest.raises(OnnxschedError, match=r"^ONNX Runtime failed: "),
    ):
        session.run({"x": np.zeros(4, np.float32), "s": np.array([3])})
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_keeps_no_count_of_its_users(folder: Path) -> None:
    code, _, stderr = shell("run s.onnx", folder, HOME="/proc/none", XDG_CACHE_HOME="/proc/none")
    assert (code, stderr) == (0, "")
