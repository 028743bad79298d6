"""A session of several streams outlives what its caller's main thread goes through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnxsched_runtime.annotation import write_annotation
from support.models import annotation_of, fork_join
from support.ranks import environment

_MAIN_THREAD_ENDS = """
import sys, threading, time
import onnxsched
from support.models import feeds_for, fork_join
session = onnxsched.load(sys.argv[1])
def serve():
    threading.main_thread().join()
    time.sleep(0.2)
    for _ in range(3):
        session.run(None, feeds_for(fork_join()))
    onnxsched.load(sys.argv[1]).run(None, feeds_for(fork_join()))
    print("served", flush=True)
threading.Thread(target=serve).start()
"""

_INTERRUPTED = """
import random, signal, sys, time
import numpy as np
import onnxsched
from support.models import feeds_for, fork_join
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
feeds = feeds_for(fork_join())
draw = random.Random(0)
with onnxsched.load(sys.argv[1]) as session:
    expected = session.run(None, feeds)
    for _ in range(500):
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 2e-3))
        try:
            end = time.monotonic() + 4e-3
            while time.monotonic() < end:
                session.run(None, feeds)
            time.sleep(1e-3)
        except KeyboardInterrupt:
            pass
        assert all(map(np.array_equal, session.run(None, feeds), expected))
print("served")
"""


@pytest.mark.parametrize("script", [_MAIN_THREAD_ENDS, _INTERRUPTED], ids=["ends", "interrupted"])
def test_a_session_still_runs(script: str, tmp_path: Path) -> None:
    model = fork_join()
    write_annotation(model, annotation_of(model, (0, 1)))
    path = tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (0, "served\n", "")
