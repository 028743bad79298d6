"""Names that are not taken yet. Pure."""

from __future__ import annotations

from collections.abc import Container


def unused_name(stem: str, *taken: Container[str]) -> str:
    """A name that is in none of these."""
    while any(stem in names for names in taken):
        stem += "_"
    return stem


def new_name(stem: str, taken: set[str]) -> str:
    """A name that is not taken yet; it is then."""
    name = unused_name(stem, taken)
    taken.add(name)
    return name
