from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def shallow_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT has two layers, which are alike, of twelve: a third of the bytes."""
    monkeypatch.setattr(importlib.import_module("sample_models.bert"), "_LAYERS", 2)
