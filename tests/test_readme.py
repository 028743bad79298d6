"""What the README tells people to type works as it stands, in its order, on any machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import CodeBlock, code_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = code_blocks(README, "console", "sh", "python")
LEFT_TO_THE_GATE = {"make", "pip", "git", "cd"}
"""They need a network or a checkout; the gate itself runs them."""


def commands(block: CodeBlock) -> list[list[str]]:
    """What a block asks to be typed: lines after `$`, or all of them where it is a script."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def process(words: list[str]) -> list[str]:
    """A command as a process of this Python and this checkout."""
    program, *arguments = words
    match program:
        case "onnxsched":
            return [sys.executable, "-m", "onnxsched", *arguments]
        case "python" | "python3":
            return [sys.executable, *arguments]
    raise AssertionError(f"the README asks for {program}, which its test does not know")


def steps() -> list[tuple[str, list[str]]]:
    """Everything to run, in order: a name for it and the process."""
    found = []
    for block in BLOCKS:
        if block.language == "python":
            found.append((f"line {block.line}", [sys.executable, "-c", block.text]))
            continue
        found += [
            (shlex.join(words), process(words))
            for words in commands(block)
            if words[0] not in LEFT_TO_THE_GATE
        ]
    return found


@pytest.mark.timeout(900)
def test_everything_it_tells_to_type_works(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    for name, command in steps():
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{name}: {run.stdout}{run.stderr}"
        assert "Traceback" not in run.stderr, name


def test_it_shows_the_command_line_and_the_python_interface() -> None:
    typed = {command[2] for _, command in steps() if command[1] == "-m"}
    assert typed == {"onnxsched", "sample_models"}
    assert any(command[1] == "-c" for _, command in steps())


def test_files_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
