"""Which onnxsched this is."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """The version of onnxsched; `source` where it runs from a checkout uninstalled."""
    try:
        return importlib.metadata.version("onnxsched")
    except importlib.metadata.PackageNotFoundError:
        return "source"
