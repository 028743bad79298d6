"""Inputs and outputs in `.npy` files."""

from __future__ import annotations

import os
import re
import tempfile
import tokenize
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from onnxsched_runtime.errors import OnnxschedError, UsageError, absent

_DAMAGE = (
    OSError, ValueError, EOFError, ArithmeticError, TypeError, SyntaxError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip
"""What numpy can raise of a file that is none of its own."""


def read_array(name: str, file: Path) -> np.ndarray:
    """Read the value of input `name` from a `.npy` file.

    Raises:
        UsageError: There is no such file, or it is no array.
    """
    if not os.path.isfile(file):
        raise UsageError(f"{absent(file)} for input '{name}'; give one that numpy.save wrote.")
    try:
        with file.open("rb") as stream:
            array = np.load(stream, allow_pickle=False)
    except _DAMAGE as error:
        if "Object arrays" in str(error):  # as numpy says it
            raise UsageError(
                f"'{file}' holds Python objects, which are not read; save input '{name}' with a "
                "type of numpy's own, strings as `array.astype(str)`."
            ) from error
        raise UsageError(f"'{file}' is no .npy file; save input '{name}' with numpy.") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"'{file}' holds several arrays; give one .npy file an input.")
    return array


def input_files(texts: Iterable[str]) -> dict[str, Path]:
    """The file of each input, of `NAME=FILE.npy` options.

    Raises:
        UsageError: An option is not of that form, or gives an input again.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not file:
            raise UsageError(f"--input {text} can't be read: write NAME=FILE.npy.")
        if name in files:
            raise UsageError(f"--input gives '{name}' twice; give each input once.")
        files[name] = Path(file)
    return files


def write_arrays(outputs: Mapping[str, Any], folder: Path) -> None:
    """Write every output or none; each element of a sequence has a file of its own.

    Raises:
        UsageError: An output is no array, as a map is none.
        OnnxschedError: They can't be written.
    """
    files: dict[str, np.ndarray] = {}
    for name, value in outputs.items():
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        while any(file.startswith(f"{stem}.") for file in files):
            stem += "_"
        if isinstance(value, list):
            files |= {f"{stem}.{i}.npy": _stored(name, part) for i, part in enumerate(value)}
        else:
            files[f"{stem}.npy"] = _stored(name, value)
    if taken := [file for file in files if os.path.isdir(folder / file)]:
        raise _unwritten(folder, f"'{taken[0]}' is a folder there")
    try:
        with (
            _made(folder),
            tempfile.TemporaryDirectory(prefix=".onnxsched-", dir=folder) as scratch,
        ):
            for file, array in files.items():
                _save(Path(scratch, file), array)
            for file in files:
                os.replace(Path(scratch, file), folder / file)
    except OSError as error:
        raise _unwritten(folder, error.strerror or error) from error


def _save(file: Path, array: np.ndarray) -> None:
    """Write an array, not as a file of C's: numpy would not say why that can't be written."""
    with file.open("wb") as stream:
        np.save(SimpleNamespace(write=stream.write), array, allow_pickle=False)


def _unwritten(folder: Path, reason: object) -> OnnxschedError:
    return OnnxschedError(
        f"The outputs can't be written to '{folder}' ({reason}); choose another folder."
    )


def _stored(name: str, value: Any) -> np.ndarray:
    """A value as a file holds it; strings not as objects, which would be pickled."""
    array = np.asarray(value)
    if array.dtype.kind != "O":
        return array
    if not all(isinstance(item, str) for item in array.flat):
        raise UsageError(
            f"Output '{name}' holds a map or nothing, which no .npy file can; leave out the "
            "folder for outputs, or this output of the model."
        )
    return array.astype(str)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and those that it lies in; gone again if something fails."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
