"""A session of several streams outlives what its caller's main thread goes through."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.ranks import run_script

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
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 2e-3))
            while True:  # until it comes, late on a busy machine
                session.run(None, feeds)
                time.sleep(1e-4)
        except KeyboardInterrupt:
            pass
        assert all(map(np.array_equal, session.run(None, feeds), expected))
print("served")
"""


@pytest.mark.parametrize("script", [_MAIN_THREAD_ENDS, _INTERRUPTED], ids=["ends", "interrupted"])
def test_a_session_still_runs(script: str, tmp_path: Path) -> None:
    found = run_script(script, (0, 1), tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (0, "served\n", "")
