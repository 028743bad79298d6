"""The command line as a process: streams, exit codes, a quick start, and no traceback."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import onnxsched
from sample_models import build
from support.optimizing import contents, saved

ROOT = Path(onnxsched.__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
    "CUDA_VISIBLE_DEVICES": "",
}


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def processors_s() -> float:
    """What ended children have taken: other tests may run meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_results_go_to_stdout_and_errors_to_stderr(tmp_path: Path) -> None:
    saved(build("tiny"), tmp_path, "tiny.onnx")
    command = ("-m", "onnxsched", "optimize", "tiny.onnx", "--no-cache", "--json", "-")
    good = process(*command, "-o", "out.onnx", folder=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["path"] == "out.onnx"
    bad = process(*command, "-o", "new.onnx", "--device", "cuda:0", folder=tmp_path)
    assert (bad.returncode, bad.stdout) == (4, "")
    assert bad.stderr == (
        "onnxsched: Device cuda:0 is not available: this machine has no CUDA device; "
        "`onnxsched doctor` says more.\n"
    )
    assert contents(tmp_path).keys() == {"tiny.onnx", "out.onnx"}


def test_an_interrupt_is_130_and_writes_nothing(tmp_path: Path) -> None:
    saved(build("squeezenet"), tmp_path, "in.onnx")
    script = (
        "import onnxsched.scheduling as s, signal, time, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup ignores it
        "s.tune = lambda *a, **k: (print('tuning', flush=True), time.sleep(60))\n"
        "from onnxsched.cli import main\n"
        "sys.argv = ['onnxsched', 'optimize', 'in.onnx', '-o', 'out.onnx', '--no-cache']\n"
        "main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "tuning\n"
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=30)
    assert (running.returncode, error) == (130, "onnxsched: Interrupted; nothing was written.\n")
    assert contents(tmp_path).keys() == {"in.onnx"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_who_is_asked_to_end_leaves_nothing(name: str, tmp_path: Path) -> None:
    saved(build("squeezenet"), tmp_path, "in.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = (
        "import onnxsched.optimizing as o, signal, sys, time\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup ignores it
        "o.optimize_file = lambda *a: (print('optimizing', flush=True), time.sleep(60))\n"
        "from onnxsched.cli import main\n"
        "sys.argv = ['onnxsched', 'optimize', 'in.onnx', '-o', 'out.onnx', '--no-cache']\n"
        "main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, text=True,
        env={**ENVIRONMENT, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == "optimizing\n"
        assert list(scratch.iterdir())
        running.send_signal(getattr(signal, name))
        _, error = running.communicate(timeout=30)
    assert (running.returncode, error) == (128 + getattr(signal, name), "")
    assert not list(scratch.iterdir())
    assert contents(tmp_path).keys() == {"in.onnx"}


@pytest.mark.parametrize("module", ["typer", "onnxsched.cli.commands", "onnxsched.pipeline"])
def test_an_interrupt_while_modules_are_imported_is_130(module: str, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == '{module}':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from onnxsched.cli import main\n"
        "sys.argv = ['onnxsched', 'optimize', 'in.onnx', '-o', 'out.onnx']\n"
        "main()"
    )
    found = process("-c", script, folder=tmp_path)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "onnxsched: Interrupted; nothing was written.\n"


def test_a_reader_that_leaves_is_no_error_message(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "onnxsched", "--help"], cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert "Traceback" not in running.stderr.read()


def test_help_comes_at_once(tmp_path: Path) -> None:
    seconds = [processors_s()]
    for _ in range(5):
        assert process("-m", "onnxsched", "--help", folder=tmp_path).returncode == 0
        seconds.append(processors_s())
    assert min(after - before for before, after in pairwise(seconds)) < 0.3


@pytest.mark.parametrize("module", ["onnxsched", "onnxsched.cli"])
def test_importing_loads_no_framework(module: str, tmp_path: Path) -> None:
    script = (
        f"import sys, {module}; "
        "print(sys.modules.keys() & {'torch', 'onnxruntime', 'onnx', 'numpy', 'rich', 'typer'})"
    )
    found = process("-c", script, folder=tmp_path)
    assert (found.returncode, found.stdout) == (0, "set()\n")
