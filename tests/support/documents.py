"""Code in Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of code."""

    language: str
    text: str
    line: int
    """Where it starts in the document."""


def code_blocks(document: str, *languages: str) -> list[CodeBlock]:
    """The fenced blocks of these languages, in order."""
    fences = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", document, re.MULTILINE | re.DOTALL)
    return [
        CodeBlock(fence[1], fence[2], document[: fence.start()].count("\n") + 1)
        for fence in fences
        if fence[1] in languages
    ]
