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

_VERSION = 1
"""Raised when the meaning of a measurement changes."""


def default_directory() -> Path:
    """Where measurements are kept if the user names no other place."""
    return Path(platformdirs.user_cache_dir("onnxsched"))


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
