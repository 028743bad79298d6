"""Measure the zoo against every peer: torch, torch.compile, ONNX Runtime and our schedules.

    python tools/suite.py --out DIR [--models bert,googlenet] [--batches 1,8] [--arms auto,ort]

Batch 1 of every model and batches up to 32 of three, unless told otherwise. Each arm runs in a
process of its own beside the reference (ONNX Runtime's CUDA graph), in interleaved rounds, and
`DIR/suite.json` is written after each: `--resume` goes on where a run ended. With `--workers` the
libraries of several arms load side by side; `--compile-only` does only what needs many cores and
no quiet GPU, and leaves it in the folder of `--work`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sample_models
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError, UsageError
from onnxsched_runtime.files import write_model, written_whole
from tools.peers import ARMS, SCHEDULE_ARMS, is_possible
from tools.suite_process import WorkerPlace, compile_arms, run_arms
from tools.suite_table import table

BATCHES = (1, 2, 4, 8, 16, 32)
SWEPT = ("inception_v3", "googlenet", "bert")
"""Models that are measured at every batch; the others at batch 1."""
_SAME = ("device", "python", "onnxruntime", "torch", "cuda", "cudnn", "driver")
"""What must not change within one result file."""


@dataclass(frozen=True)
class Configuration:
    """A model at a size."""

    model: str
    batch: int
    image: int | None = None
    sequence: int | None = None

    @property
    def title(self) -> str:
        """A name that tells it from others."""
        sizes = (self.batch, self.image, self.sequence)
        return "-".join([self.model, *(str(size) for size in sizes if size is not None)])

    @property
    def has_images(self) -> bool:
        """Whether it takes images, which have layouts."""
        return self.model == "tiny" or sample_models.MODELS[self.model].image is not None

    def write(self, path: Path) -> None:
        """Build the model and write it."""
        proto = sample_models.build(
            self.model, batch=self.batch, image=self.image, sequence=self.sequence
        )
        write_model(proto, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure what is missing, write, print."""
    options = _parser().parse_args(arguments)
    if options.workers < 1 or (options.compile_only and options.work is None):
        sys.exit("--workers is at least 1, and --compile-only needs --work.")
    try:
        report = opened(options.out, options.resume, options.retry)
        measure_all(options, report)
    except (OnnxschedError, sample_models.ModelError) as error:
        sys.exit(str(error))
    text = table(report)
    (options.out / "suite.md").write_text(text)
    print(text, end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--models", help="comma-separated; all")
    parser.add_argument("--batches", help="comma-separated, for every model that is measured")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(ARMS)}; all")
    parser.add_argument("--device", default="cuda:0", help="where to measure; cuda:0")
    parser.add_argument("--limit", type=float, default=300, help="seconds a step; 300")
    parser.add_argument("--budget", type=float, help="of optimize, in seconds")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="arms prepared at a time; memory is only measured with 1, the default",
    )
    parser.add_argument("--work", type=Path, help="folder that keeps models and what is compiled")
    parser.add_argument("--compile-only", action="store_true", help="measure nothing; see --work")
    parser.add_argument("--stop-after", type=float, help="begin nothing after so many seconds")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    parser.add_argument("--retry", action="store_true", help="and measure again what failed")
    parser.add_argument("--image", type=int, help="height and width of images")
    parser.add_argument("--sequence", type=int, help="length of sequences")
    parser.add_argument("--warmup-ms", type=float, default=100, help="before measuring; 100")
    parser.add_argument("--iterations", type=int, default=100, help="samples an arm; 100")
    return parser


def opened(folder: Path, resume: bool, retry: bool) -> dict[str, Any]:
    """The report so far.

    Raises:
        UsageError: There is one that nobody asked to go on with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suite.json"
    if not path.exists():
        return {"schema_version": 1, "results": []}
    if not resume:
        raise UsageError(f"'{path}' is there; add --resume to go on with it, or choose another.")
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        kept = [entry for entry in report["results"] if not (retry and entry["error"])]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"'{path}' is no result of the suite; choose another folder.") from error
    return {**report, "results": kept}


def measure_all(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure every arm of every configuration that the report lacks, and add it.

    Raises:
        UsageError: An option names no model, arm or number, or the machine is another one.
    """
    limit_s = float("inf") if options.stop_after is None else options.stop_after
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="onnxsched-suite-") as scratch:
        wanted = list(_wanted(options, report, options.work or Path(scratch)))
        if not wanted or time.monotonic() >= end:
            return
        for configuration, place, _ in wanted:
            place.folder.mkdir(parents=True, exist_ok=True)
            configuration.write(place.source)
        compile_arms([(arm, place) for _, place, missing in wanted for arm in missing], end)
        for configuration, place, missing in () if options.compile_only else wanted:
            for first in range(0, len(missing), options.workers):
                arms = missing[first : first + options.workers]
                if time.monotonic() >= end:
                    return
                for arm, found in run_arms(arms, place):
                    _add(report, configuration, arm, found)
                    save(report, options.out / "suite.json")
                    print(_line(configuration, arm, found), flush=True)


def _wanted(
    options: argparse.Namespace, report: dict[str, Any], folder: Path
) -> Iterator[tuple[Configuration, WorkerPlace, list[str]]]:
    """Each configuration with arms that the report lacks, where it is measured, and those."""
    device = Device.parse(options.device)
    arms = _chosen_arms(options.arms)
    for configuration in configurations(options):
        done = {entry["arm"] for entry in report["results"] if _is_of(entry, configuration)}
        possible = {a for a in arms if is_possible(a, device, configuration.has_images)}
        if missing := sorted(possible - done, key=_order):
            place = WorkerPlace(
                folder / configuration.title,
                options.device,
                options.limit,
                options.warmup_ms,
                options.iterations,
                options.budget,
            )
            yield configuration, place, missing


def configurations(options: argparse.Namespace) -> Iterator[Configuration]:
    """What is measured: batch 1 first.

    Raises:
        UsageError: An option names no model or no number.
    """
    known = {**sample_models.MODELS, "tiny": None}
    models = options.models.split(",") if options.models else list(sample_models.MODELS)
    if unknown := [name for name in models if name not in known]:
        raise UsageError(f"There is no model '{unknown[0]}'; there are {', '.join(known)}.")
    texts = options.batches.split(",") if options.batches else [str(b) for b in BATCHES]
    if wrong := [text for text in texts if not text.isdecimal() or int(text) < 1]:
        raise UsageError(f"--batches holds '{wrong[0]}'; give whole numbers from 1.")
    for batch in map(int, texts):
        for name in models:
            if not options.batches and batch > 1 and name not in SWEPT:
                continue
            model = sample_models.MODELS.get(name)
            has_images = name == "tiny" or (model is not None and model.image is not None)
            has_sequence = model is not None and model.sequence is not None
            yield Configuration(
                name,
                batch,
                options.image if has_images else None,
                options.sequence if has_sequence else None,
            )


def _chosen_arms(text: str | None) -> list[str]:
    names = text.split(",") if text else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise UsageError(f"There is no arm '{unknown[0]}'; there are {', '.join(ARMS)}.")
    return names


def _order(arm: str) -> tuple[bool, int]:
    """`auto` before the single policies: it profiles, they find the measurements."""
    return (arm in SCHEDULE_ARMS and arm != "auto", list(ARMS).index(arm))


def _is_of(entry: dict[str, Any], configuration: Configuration) -> bool:
    sizes = {"model", "batch", "image", "sequence"}
    return all(entry[key] == getattr(configuration, key) for key in sizes)


def _add(
    report: dict[str, Any], configuration: Configuration, arm: str, found: dict[str, Any]
) -> None:
    """Add a result.

    Raises:
        UsageError: It comes from another machine than those before it.
    """
    environment = found.pop("environment", None)
    if environment is not None:
        report.setdefault("environment", environment)
        report.setdefault("date", time.strftime("%Y-%m-%d"))
        require_same_machine(report["environment"], environment)
    report["results"].append(
        {
            "model": configuration.model,
            "batch": configuration.batch,
            "image": configuration.image,
            "sequence": configuration.sequence,
            "arm": arm,
            "what": ARMS[arm],
            "error": None,
            **found,
        }
    )


def require_same_machine(known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Let no results of two machines, or of two versions of a library, into one file.

    Raises:
        UsageError: They are.
    """
    for key in _SAME:
        if known.get(key) != found.get(key):
            raise UsageError(
                f"The results so far were measured with {key} {known.get(key)}, this machine has "
                f"{found.get(key)}; choose another folder."
            )


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write results whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(report, indent=1) + "\n")


def _line(configuration: Configuration, arm: str, found: dict[str, Any]) -> str:
    head = f"{configuration.model:14}{configuration.batch:3} {arm:28}"
    if found.get("error"):
        return f"{head}{found['error']}"
    value = found["ratio"]["value"]
    return f"{head}{found['time']['median_us']:10.1f} us {value:6.2f}x"


if __name__ == "__main__":
    main()
