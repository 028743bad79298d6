"""`import onnxsched` offers what its documentation says, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import onnxsched
from support.documents import code_blocks

ROOT = Path(onnxsched.__file__).parent.parent


@pytest.mark.parametrize("name", onnxsched.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(onnxsched, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_names_are_listed_once_and_in_order() -> None:
    assert onnxsched.__all__ == sorted(set(onnxsched.__all__))
    assert dir(onnxsched) == onnxsched.__all__


def test_static_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(onnxsched.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: getattr(onnxsched, name).__module__ for name in onnxsched.__all__}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'onnxsched' has no attribute 'unheard'"):
        _ = onnxsched.unheard


@pytest.mark.parametrize("name", ["bench", "load", "optimize"])
def test_every_parameter_of_a_function_is_explained(name: str) -> None:
    function: Any = getattr(onnxsched, name)
    explained = re.findall(r"^    (\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    parameters = list(inspect.signature(function).parameters)
    assert [word for word in explained if word in parameters] == parameters


def test_documents_use_public_names_only() -> None:
    texts = [onnxsched.__doc__ or ""]
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        texts += [block.text for block in code_blocks(path.read_text(), "python")]
    used = {name for text in texts for name in re.findall(r"\bonnxsched\.(\w+)", text)}
    assert {"load", "optimize"} <= used <= set(onnxsched.__all__)


def test_errors_are_one_family() -> None:
    from onnxsched_runtime import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(kind, onnxsched.OnnxschedError) for kind in kinds)
    assert isinstance(errors, ModuleType)
