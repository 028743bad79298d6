"""Signals to one of several processes: it ends with its exit code, and the others name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.models import annotated, fork_join
from support.optimizing import saved
from support.ranks import Ended, environment, run_ranks

pytestmark = pytest.mark.timeout(60, method="thread")

ENDLESS = ("--bench", "1000000000")
INTERRUPTED = "onnxsched: Interrupted.\n"
ASKED = "onnxsched: Rank {} was asked to end (SIGTERM).\n"
ASKED_EARLY = (
    "onnxsched: Rank {} was asked to end (SIGTERM) while it loaded the model; another may have "
    "ended.\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model over two devices."""
    return saved(annotated(fork_join(), (0, 1), device_count=2), tmp_path)


def ended_while_importing(module: str, name: str) -> Ended:
    """How a process ends that gets a signal, or two, while it imports a module."""
    script = (
        "import os, runpy, signal, sys\n"
        "class Signalling:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == '{module}':\n"
        f"            os.kill(os.getpid(), signal.{name})\n"
        f"            os.kill(os.getpid(), signal.{name})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup ignores it
        "sys.meta_path.insert(0, Signalling())\n"
        "sys.argv = ['distributed', 'none.onnx', '--timeout', '9']\n"
        "runpy.run_module('onnxsched_runtime.distributed', run_name='__main__')"
    )
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    start_s = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(**variables), capture_output=True, text=True,
    )  # fmt: skip
    return Ended(found.returncode, found.stdout, found.stderr, time.monotonic() - start_s)


@pytest.mark.parametrize(
    "module", ["onnxsched_runtime.distributed.command", "numpy", "onnxruntime", "torch"]
)
def test_an_interrupt_while_modules_are_imported_is_130(module: str) -> None:
    ended = ended_while_importing(module, "SIGINT")
    assert (ended.code, ended.stdout, ended.stderr) == (130, "", INTERRUPTED)


def test_who_is_asked_to_end_while_modules_are_imported_does() -> None:
    ended = ended_while_importing("numpy", "SIGTERM")
    assert (ended.code, ended.stdout, ended.stderr) == (143, "", ASKED_EARLY.format(1))


def test_an_interrupt_while_it_runs_is_130_and_ends_all(path: Path) -> None:
    ended = run_ranks(2, "command", "SIGINT@1", str(path), *ENDLESS)
    assert (ended[1].code, ended[1].stderr) == (130, INTERRUPTED)
    told = "onnxsched: Rank 1 failed: KeyboardInterrupt\n"
    assert (ended[0].code, ended[0].stderr) == (1, told)


@pytest.mark.parametrize("kind", ["asked", "deaf"])
def test_who_is_asked_to_end_while_it_loads_says_so(kind: str, path: Path) -> None:
    ended = run_ranks(2, "command", f"{kind}@1", str(path), "--timeout", "4")
    assert (ended[1].code, ended[1].stderr) == (143, ASKED_EARLY.format(1))
    told = "onnxsched: Rank 1 has not come within 4 s.\n"
    assert (ended[0].code, ended[0].stderr) == (1, told)


@pytest.mark.parametrize("asked", [0, 1])
def test_who_is_asked_to_end_while_it_runs_does_and_the_other_names_it(
    asked: int, path: Path
) -> None:
    ended = run_ranks(2, "command", f"SIGTERM@{asked}", str(path), *ENDLESS)
    assert (ended[asked].code, ended[asked].stderr) == (143, ASKED.format(asked))
    other = ended[1 - asked]
    assert (other.code, other.stderr.count("\n")) == (1, 1)
    assert other.stderr.startswith(f"onnxsched: Rank {asked}")
    assert "died" in other.stderr


def torchrun(path: Path) -> subprocess.Popen[str]:
    """Two processes that run on and on."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "onnxsched_runtime.distributed", str(path), *ENDLESS],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def workers_of(launcher: int) -> list[int]:
    """The two processes of a launcher, once both can be asked to end; needs Linux."""
    while True:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        ready = [int(child) for child in children if _handles_its_signals(child)]
        if len(ready) == 2:
            return ready
        time.sleep(0.05)


def _handles_its_signals(pid: str) -> bool:
    """Whether a process is the launcher's no more, but ours, and has a handler for SIGTERM."""
    command = Path(f"/proc/{pid}/cmdline").read_text()
    is_ours = "-u\0-m\0onnxsched_runtime.distributed\0" in command
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return is_ours and bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize("is_alone", [False, True])
def test_torchrun_and_all_its_processes_end_when_asked(is_alone: bool, path: Path) -> None:
    with torchrun(path) as launcher:
        workers = workers_of(launcher.pid)
        os.kill(workers[1] if is_alone else launcher.pid, signal.SIGTERM)
        start_s = time.monotonic()
        _, error = launcher.communicate(timeout=50)
    assert time.monotonic() - start_s < 20  # before torchrun kills them
    assert launcher.returncode != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    said = [line for line in error.splitlines() if line.startswith("onnxsched: ")]
    assert len(said) == 2
    assert any("was asked to end (SIGTERM)" in line for line in said)
    assert ("exitcode  : 143" in error) == is_alone
