"""The cache keeps what was measured, and nothing that can't be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxsched.profiling.cache import (
    MeasurementCache,
    default_directory,
    directory_for,
    environment_key,
)
from onnxsched_runtime.errors import UsageError

CONTENT = {"samples_us": [1.5, 2.0], "kernels": []}


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path / "cache", "this machine")


def file_of(cache: MeasurementCache) -> Path:
    assert cache.directory is not None
    (file,) = cache.directory.rglob("*.json")
    return file


def test_what_is_written_is_read(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    assert cache.read("key") == CONTENT


def test_the_last_value_counts(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    cache.write("key", [1])
    assert cache.read("key") == [1]


@pytest.mark.parametrize("content", [None, 0, "text", [], {"1": [2.5, None, True]}])
def test_every_json_value_can_be_kept(cache: MeasurementCache, content: Any) -> None:
    cache.write("key", content)
    assert cache.read("key") == content


def test_other_keys_and_other_machines_have_no_value(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    assert cache.read("another") is None
    assert MeasurementCache(cache.directory, "other machine").read("key") is None


def test_only_the_value_lies_in_the_folder(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    assert cache.directory is not None
    assert [path for path in cache.directory.rglob("*") if path.is_file()] == [file_of(cache)]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"content": 1}',
        b'{"digest": "x"}',
        b"[" * 200_000,
    ],
)
def test_a_damaged_file_counts_as_none(cache: MeasurementCache, damage: bytes) -> None:
    cache.write("key", CONTENT)
    file_of(cache).write_bytes(damage)
    assert cache.read("key") is None
    cache.write("key", CONTENT)
    assert cache.read("key") == CONTENT


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_counts_as_none(cache: MeasurementCache, part: float) -> None:
    cache.write("key", CONTENT)
    whole = file_of(cache).read_bytes()
    file_of(cache).write_bytes(whole[: int(part * len(whole))])
    assert cache.read("key") is None


def test_a_changed_value_counts_as_none(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    entry = json.loads(file_of(cache).read_text())
    entry["content"]["samples_us"][0] = 0.001
    file_of(cache).write_text(json.dumps(entry))
    assert cache.read("key") is None


def test_a_file_under_another_name_counts_as_none(cache: MeasurementCache) -> None:
    cache.write("key", CONTENT)
    whole = file_of(cache).read_bytes()
    cache.write("another", [1])
    for file in (cache.directory or Path()).rglob("*.json"):
        file.write_bytes(whole)
    assert cache.read("key") == CONTENT
    assert cache.read("another") is None


def test_a_folder_that_takes_no_files_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = MeasurementCache(tmp_path / "file" / "cache", "this machine")
    cache.write("key", CONTENT)
    assert cache.read("key") is None


def test_no_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = MeasurementCache(None, "this machine")
    cache.write("key", CONTENT)
    assert cache.read("key") is None
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory().name == "onnxsched"


def test_environments_are_compared_as_a_whole() -> None:
    assert environment_key({"a": 1, "b": 2}) == environment_key({"b": 2, "a": 1})
    assert environment_key({"a": 1, "b": 2}) != environment_key({"a": 1, "b": 3})


def test_libraries_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    (library := tmp_path / "ops.so").write_bytes(b"code")
    none = environment_key({})
    assert environment_key({}, [str(library)]) != none
    assert environment_key({}, [str(tmp_path), "n" * 300, str(tmp_path / "none.so")]) == none


def test_a_folder_that_keeps_nothing_is_refused_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=r"can't keep measurements \(Not a directory\); choose"):
        directory_for(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert directory_for("") is None
    assert directory_for(None) is None
    assert directory_for(tmp_path / "made" / "later") == tmp_path / "made" / "later"
    assert [*tmp_path.iterdir()] == [file]
