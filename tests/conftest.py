"""The gate tries the same examples every time, so that it fails for a change and not by chance.

`pytest --hypothesis-profile explore` tries others.
"""

from __future__ import annotations

import importlib

import pytest
from hypothesis import settings

settings.register_profile("gate", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("gate")


@pytest.fixture
def shallow_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT and T5 have two layers, which are alike, of twelve and six: a third of the bytes."""
    for name in ("bert", "t5"):
        monkeypatch.setattr(importlib.import_module(f"sample_models.{name}"), "_LAYERS", 2)
