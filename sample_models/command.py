"""What the command `python -m sample_models` does: lists the models, or writes one."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sample_models.errors import ModelError
from sample_models.registry import OFFERED, build

_USAGE_ERROR = 2
_WRITE_ERROR = 1


class _Parser(argparse.ArgumentParser):
    """A parser that ends in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"{self.prog}: {message}.\n")

    def print_help(self, file: object = None) -> None:
        print(self.format_help(), end="")  # argparse would say nothing of a full disk


def _parser() -> _Parser:
    parser = _Parser(
        prog="sample_models",
        description="Writes a sample model with seeded random weights; lists them without NAME.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the model to write")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the file to write")
    parser.add_argument("--image", type=int, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=1, help="samples in one run (default: 1)")
    parser.add_argument("--sequence", type=int, help="length of the sequences")
    return parser


def _list() -> str:
    width = max(map(len, OFFERED))
    return "\n".join(f"{name:{width}}  {model.description}" for name, model in OFFERED.items())


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is not a regular file")
    partial = target.with_name(f".sample_models-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
        arguments: The arguments after the command's name.

    Raises:
        SystemExit: The command failed, with 2 for its usage and 1 for writing the file.
    """
    parser = _parser()
    if not arguments:
        print(_list())
        return
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.error(f"the name of a model is missing: choose one of {', '.join(OFFERED)}")
    if options.output is None:
        parser.error(f"no file to write {options.name} to: name one with -o FILE")
    if str(options.output) == "-":
        parser.error("-o - is no file, and stdout takes no models: name a file with -o FILE")
    try:
        model = build(
            options.name, image=options.image, batch=options.batch, sequence=options.sequence
        )
    except ModelError as error:
        parser.error(str(error))
    try:
        _write(options.output, model.SerializeToString())
    except OSError as error:
        reason = error.strerror or error
        advice = "name a file in a folder that exists and that you may write to"
        parser.exit(
            _WRITE_ERROR, f"{parser.prog}: cannot write {options.output}: {reason}; {advice}.\n"
        )
