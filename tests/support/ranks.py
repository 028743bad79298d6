"""Several processes on gloo, and one of them, which may be made to misbehave.

python -m support.ranks models cpu|cuda COUNT     run that many of the test models
python -m support.ranks groups MODEL              run it in a group of some, and of all
python -m support.ranks again MODEL               fail to load it once, then load it many times
python -m support.ranks command KIND@RANK ...     the command line, which one rank spoils
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from onnxsched_runtime.arguments import zeros
from onnxsched_runtime.device import Device, DeviceKind

ROOT = Path(__file__).parents[2]
_PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in (".", "runtime", "tests"))


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    stdout: str
    stderr: str
    after_s: float


def environment(**variables: str) -> dict[str, str]:
    """What a process of a test sees."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    paths = os.pathsep.join(filter(None, [_PYTHONPATH, os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}


def run_script(
    script: str, streams: Sequence[int], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script on the path of `fork_join` over some streams, in a process of its own."""
    from support.models import annotated, fork_join
    from support.optimizing import saved

    path = saved(annotated(fork_join(), streams), folder)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def run_ranks(
    count: int, *arguments: str, folder: Path | None = None, limit_s: float = 40.0
) -> list[Ended]:
    """Start processes of this module side by side, as torchrun would; returns them by rank.

    One that is stopped is killed when all others have ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "support.ranks", *arguments],
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                FOLDER=str(folder),
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    ended: dict[int, float] = {}
    start_s = time.monotonic()
    while len(ended) < count and time.monotonic() < start_s + limit_s:
        for rank, process in enumerate(started):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic() - start_s
        left = [process.pid for rank, process in enumerate(started) if rank not in ended]
        if len(left) == 1 and _is_stopped(left[0]):
            break
        time.sleep(0.02)
    results = []
    for rank, process in enumerate(started):
        if rank not in ended:
            process.kill()
        stdout, stderr = process.communicate()
        results.append(Ended(process.returncode, stdout, stderr, ended.get(rank, limit_s)))
    return results


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; needs Linux."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _run_models(kind: DeviceKind, count: int) -> None:
    """Run test models over as many GPUs as there are ranks, or one more group of threads."""
    import torch.distributed

    from onnxsched_runtime.load import load
    from support.models import MODELS, annotated, feeds_for, host_reasons, reference
    from support.optimizing import assert_close, saved

    torch.distributed.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(os.environ["FOLDER"])
    done: list[str] = []
    for name, build in MODELS.items():
        model = build()
        is_refused = kind == "cuda" and host_reasons(model)
        if len(model.graph.node) < size or is_refused or len(done) == count:
            continue
        device_count = min(len(model.graph.node), size + (kind == "cpu"))
        annotated(model, (0, 1), device=Device(kind), device_count=device_count)
        path = saved(model, folder, f"{name}.{rank}.onnx")
        with load(path, process_group=torch.distributed.group.WORLD) as session:
            for seed in range(3):
                feeds = feeds_for(model, seed)
                if rank == 0:
                    tolerance = 1e-5 if kind == "cpu" else 1e-2  # TF32
                    assert_close(session.run(None, feeds), reference(model, feeds), tolerance)
                else:
                    assert session.get_inputs() == session.get_outputs() == []
                    assert session.run(None, {}) == []
            done.append(f"{name}:{session.capture}")
    torch.distributed.destroy_process_group()
    print(*done)


def _spoil(kind: str) -> None:
    """Let this process misbehave: once it has run two segments, if not said otherwise."""
    from onnxsched_runtime.errors import ModelError, OnnxschedError
    from onnxsched_runtime.group import GlooLinks
    from onnxsched_runtime.session import OrtSession

    real = OrtSession.run
    run_count = 0

    def run(self: OrtSession, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        nonlocal run_count
        run_count += 1
        if run_count > 2:
            if kind.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[kind])
            elif kind == "hang":
                threading.Event().wait()
            elif kind == "fail":
                raise OnnxschedError("ONNX Runtime failed: planted.")
        return real(self, feeds, outputs)

    def refuse(*_: object) -> None:
        raise ModelError("ONNX Runtime refuses the model (planted).")

    def break_down(*_: object) -> None:
        raise ValueError("planted\nin two lines")

    def wait_to_end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    def wait_in_c(*_: object) -> None:
        mutex = ctypes.create_string_buffer(64)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for _again in range(2):  # the second waits for the first, whatever signal comes
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    def die(self: GlooLinks, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kind == "absent":
        sys.exit(3)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stdout.fileno())
    elif kind == "connect":
        GlooLinks.__init__ = die  # type: ignore[assignment,method-assign]
    elif kind == "version":
        ranks: Any = import_module("onnxsched_runtime.executors.ranks")
        ranks.own_version = lambda: "0.0.7"
    elif kind in ("load", "unforeseen", "asked", "deaf"):
        module: Any = import_module("onnxsched_runtime.load")
        instead = {
            "load": refuse, "unforeseen": break_down, "asked": wait_to_end, "deaf": wait_in_c,
        }  # fmt: skip
        module.lowered_source = instead[kind]
    else:
        OrtSession.run = run  # type: ignore[assignment,method-assign]


def _run_groups(path: str) -> None:
    """Open sessions for some of three ranks, then for all."""
    import torch.distributed

    from onnxsched_runtime.errors import UsageError
    from onnxsched_runtime.load import load

    torch.distributed.init_process_group("gloo")
    pair, rank = torch.distributed.new_group([0, 1]), torch.distributed.get_rank()
    said = []
    for group in (pair, torch.distributed.group.WORLD, pair):
        try:
            with load(path, process_group=group, timeout_s=10.0) as session:
                feeds = {a.name: zeros(a) for a in session.get_inputs()} if rank == 0 else {}
                session.run(None, feeds)
                said.append("run")
        except UsageError as error:
            said.append(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print(*said, sep="|")


def _run_again(path: str) -> None:
    """Fail to load on one of two ranks, then load, run and close over and over."""
    import gc

    import torch.distributed

    from onnxsched_runtime.errors import OnnxschedError
    from onnxsched_runtime.load import load

    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    try:
        load("missing.onnx" if rank == 1 else path, process_group=world, timeout_s=12.0)
    except OnnxschedError as error:
        print(error)
    gc.disable()
    open_counts = []
    for _ in range(7):
        with load(path, process_group=world, timeout_s=12.0) as session:
            session.run(None, {a.name: zeros(a) for a in session.get_inputs()})
        del session
        time.sleep(0.1)  # the other rank, and the store, let go when they come to it
        open_counts.append(len(os.listdir("/proc/self/fd")))
    torch.distributed.destroy_process_group()
    print("kept few", min(open_counts[-2:]) - open_counts[0] < 9)  # else three a load


def _run_command(spoiler: str, arguments: Sequence[str]) -> NoReturn:
    from onnxsched_runtime import distributed

    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    kind, _, rank = spoiler.partition("@")
    if rank == os.environ["RANK"]:
        _spoil(kind)
    distributed.main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "models":
        _run_models("cuda" if sys.argv[2] == "cuda" else "cpu", int(sys.argv[3]))
    elif sys.argv[1] == "again":
        _run_again(sys.argv[2])
    elif sys.argv[1] == "groups":
        _run_groups(sys.argv[2])
    else:
        _run_command(sys.argv[2], sys.argv[3:])
