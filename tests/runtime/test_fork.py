"""A session does not hang in a fork of its process, which has none of its threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.ranks import run_script

_SCRIPT = """
import os, signal, sys
import numpy as np
import onnxsched
from onnxsched_runtime.errors import UsageError
from support.models import feeds_for, fork_join
feeds = feeds_for(fork_join())
with onnxsched.load(sys.argv[1]) as session:
    expected = session.run(None, feeds)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            same = all(map(np.array_equal, session.run(None, feeds), expected))
            print("same" if same else "other", flush=True)
        except UsageError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    session.run(None, feeds)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ((0,), "same"),
        ((0, 1), "The session was loaded before this process was forked, which leaves threads "
                 "behind; load the model in each process."),
    ],
)  # fmt: skip
def test_several_streams_are_refused_in_a_fork(
    streams: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    found = run_script(_SCRIPT, streams, tmp_path)
    assert (found.returncode, found.stderr, found.stdout) == (0, "", f"{said}\n")
