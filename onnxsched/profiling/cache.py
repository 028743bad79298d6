"""A cache of measurements on disk, one small file a key. What can't be trusted is not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from onnxsched_runtime.errors import UsageError

_VERSION = 1
"""Raised when the meaning of a measurement changes."""


def default_directory() -> Path:
    """Where measurements are kept if the user names no other place."""
    return Path(platformdirs.user_cache_dir("onnxsched"))


def directory_for(asked: str | os.PathLike[str] | None) -> Path | None:
    """Where measurements are kept; None for nowhere, also if the user's own cache can't be.

    Args:
        asked: A folder; "" for the user's cache, None for nowhere.

    Raises:
        UsageError: Nothing can be kept in the folder that is asked for.
    """
    if asked is None:
        return None
    directory = Path(asked) if asked != "" else default_directory()
    reason = why_unusable(directory)
    if reason is None:
        return directory
    if asked == "":
        return None
    raise UsageError(
        f"--cache-dir '{directory}' can't keep measurements ({reason}); choose another folder, or "
        "--no-cache."
    )


def why_unusable(directory: Path) -> str | None:
    """Why nothing can be kept in a folder, which need not be there yet; None where it can."""
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(directory)  # which a name too long for any folder fails at
        with tempfile.TemporaryDirectory(prefix=".onnxsched-", dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


@dataclass(frozen=True, slots=True)
class MeasurementCache:
    """JSON values by key, each valid only for the environment it was measured in."""

    directory: Path | None
    """None keeps nothing."""
    environment: str
    """All that measurements depend on beside the key: GPU, driver, library versions."""

    def read(self, key: str) -> Any:
        """The value kept for `key`; None where there is none or it is damaged."""
        if self.directory is None:
            return None
        try:
            entry = json.loads(self._path(key).read_bytes())
            content = entry["content"]
            if entry["digest"] == self._digest(key, content):
                return content
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def write(self, key: str, content: Any) -> None:
        """Keep a value; a full or read-only disk keeps nothing and does not disturb."""
        if self.directory is None:
            return
        path = self._path(key)
        content = json.loads(json.dumps(content))
        entry = json.dumps({"content": content, "digest": self._digest(key, content)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                draft = Path(scratch, path.name)
                draft.write_text(entry)
                os.replace(draft, path)
        except OSError:
            return

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        name = hashlib.sha256(f"{_VERSION}/{self.environment}/{key}".encode()).hexdigest()
        return self.directory / name[:2] / f"{name}.json"

    def _digest(self, key: str, content: Any) -> str:
        text = json.dumps([self.environment, key, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def environment_key(environment: Mapping[str, Any], libraries: Sequence[str] = ()) -> str:
    """A stable text of an environment and of the content of custom operator libraries."""
    digests = []
    for library in libraries:
        with contextlib.suppress(OSError):  # whoever loads it says what is wrong with it
            digests.append(hashlib.sha256(Path(library).read_bytes()).hexdigest())
    return json.dumps([environment, digests], sort_keys=True)
