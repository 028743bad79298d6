"""Where results go: text or JSON on stdout, JSON to files, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsched_runtime.errors import OnnxschedError, is_special

if TYPE_CHECKING:
    from onnxsched.profiling.measure import Progress


@contextmanager
def progress_line() -> Iterator[Progress]:
    """A progress line on stderr; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=max(total, 1)
        )


def require_json_target(
    target: str | None, *others: Path | None, models: Sequence[Path | None] = ()
) -> None:
    """Check before the work starts that JSON has a place to go to; `-` always is one.

    Args:
        target: The file.
        others: What the command reads or writes besides.
        models: Models that it reads.

    Raises:
        UsageError, OnnxschedError: As `require_target` says.
    """
    from onnxsched_runtime.files import require_target

    if target not in (None, "-") and is_special(target):
        raise OnnxschedError(
            f"--json '{target}' can't be written (it is no regular file); choose another, or "
            "--json - for stdout."
        )
    if target != "-":
        require_target("--json", target, *others, *models, models=models)


def emit(target: str | None, content: Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print the result as text; or as JSON on stdout for `-`; or both, JSON to a file.

    Raises:
        OnnxschedError: The file can't be written.
    """
    if target == "-":
        print(_json(content))
        return
    if target is not None:
        write_json(target, content)
    show()


def write_json(target: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OnnxschedError: It can't be written.
    """
    from onnxsched_runtime.files import written_whole

    with written_whole(target) as draft:
        draft.write_text(_json(content) + "\n")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
