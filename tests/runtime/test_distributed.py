"""Several processes run one schedule: right results, and all end when one does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsched_runtime.annotation import write_annotation
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.distributed import command as commands
from onnxsched_runtime.distributed import run
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.group import joined_process_group
from onnxsched_runtime.load import load
from onnxsched_runtime.model import name_nodes
from support.models import (
    MODELS,
    annotated,
    annotation_of,
    assert_same,
    feeds_for,
    fork_join,
    reference,
)
from support.optimizing import parsed, saved
from support.ranks import Ended, environment, run_ranks

pytestmark = pytest.mark.timeout(60, method="thread")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model over four devices."""
    return saved(annotated(fork_join(), (0, 1), device_count=4), tmp_path)


def command(count: int, path: Path, spoiler: str, *options: str) -> list[Ended]:
    return run_ranks(count, "command", spoiler, str(path), *options)


def assert_all_end(ended: list[Ended], sentence: str, *, but: int | None = None) -> None:
    """Check that each process but one says the same sentence and nothing else, in time."""
    for rank, process in enumerate(ended):
        if rank != but:
            assert (process.code, process.stderr) == (1, f"onnxsched: {sentence}\n")
            assert process.after_s < 30


@pytest.mark.parametrize("text", ["x", "=x.npy", "x=", ""])
def test_an_input_that_is_no_pair_is_shown_as_it_was_given(text: str, path: Path) -> None:
    with load(path) as session, pytest.raises(UsageError) as caught:
        commands._feeds(session, [text])
    assert str(caught.value) == f"--input {text} can't be read: write NAME=FILE.npy."


def test_two_processes_compute_every_model(tmp_path: Path) -> None:
    ended = run_ranks(2, "models", "cpu", "99", folder=tmp_path)
    assert [(process.code, process.stderr) for process in ended] == [(0, "")] * 2
    assert ended[0].stdout.split() == [f"{name}:none" for name in MODELS]


def test_four_processes_compute_models(tmp_path: Path) -> None:
    ended = run_ranks(4, "models", "cpu", "3", folder=tmp_path)
    assert [(process.code, process.stderr) for process in ended] == [(0, "")] * 4
    assert len(ended[0].stdout.split()) == 3


def test_torchrun_runs_and_times_a_schedule(path: Path, tmp_path: Path) -> None:
    model = fork_join()
    (name, value), = feeds_for(model).items()  # fmt: skip
    np.save(tmp_path / "x.npy", value)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         "2", "-m", "onnxsched_runtime.distributed", str(path), "--bench", "20",
         "--input", f"{name}={tmp_path / 'x.npy'}", "--output-dir", str(tmp_path / "outputs"),
         "--json", "-"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(found.stdout)
    assert result["ranks"] == {"cpu:0": 0, "cpu:1": 0, "cpu:2": 1, "cpu:3": 1}
    assert len(result["latency_us"]) == 20
    assert result["outputs"] == {"y": "float32[1, 8, 6, 6]"}
    assert_same([np.load(tmp_path / "outputs" / "y.npy")], reference(model, {name: value}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *((("--timeout", seconds), "is no time") for seconds in ("inf", "1e30", "-1", "0", "nan")),
        (("--bench", "-20"), "--bench -20 is too few"),
        (("--json", "none/result.json"), "There is no folder"),
        (("--json", "."), "--json '.' is a folder"),
        (("--json", "./none.onnx"), "--json './none.onnx' is a file that this command reads"),
        (("--json", "x.npy", "--input", "x=./x.npy"), "--json 'x.npy' is a file that this"),
    ],
)
def test_what_cannot_end_well_is_refused_first(
    options: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "joined_process_group", pytest.fail)
    code, said = run(["none.onnx", *options], [])
    assert code == 2
    assert sentence in said


def alone(redirected: str, path: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the only process of a group, with redirections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = subprocess.run(
        f"'{sys.executable}' -m onnxsched_runtime.distributed {redirected}", shell=True,
        cwd=path.parent, executable="/bin/bash", capture_output=True, text=True,
        env=environment(
            RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **variables
        ),
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


FULL = "onnxsched: The result can't be written to stdout (No space left on device).\n"
LEFT = " | true; exit ${PIPESTATUS[0]}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("redirected", "unbuffered", "ended"),
    [
        ("in.onnx >/dev/full", "", (1, "", FULL)),
        ("in.onnx --json - >/dev/full", "1", (1, "", FULL)),
        ("--help >/dev/full", "", (1, "", FULL)),
        (f"in.onnx --json - {LEFT}", "", (1, "", "")),
        (f"in.onnx {LEFT}", "1", (1, "", "")),
        ("in.onnx >&-", "", (0, "", "")),
        ("nope >&- 2>&-", "", (2, "", "")),
    ],
)
def test_streams_that_take_nothing_end_as_those_of_onnxsched(
    redirected: str, unbuffered: str, ended: tuple[int, str, str], path: Path
) -> None:
    assert alone(redirected, path, PYTHONUNBUFFERED=unbuffered) == ended


def test_a_wrong_option_is_one_sentence(path: Path) -> None:
    sentence = "Unrecognized arguments: --frob; `--help` says more."
    assert run([str(path), "--frob"], []) == (2, sentence)


def test_others_end_well_where_the_first_cannot_print(path: Path) -> None:
    ended = run_ranks(2, "command", "full@0", str(path))
    assert [(process.code, process.stderr) for process in ended] == [(1, FULL), (0, "")]


def test_only_the_first_rank_needs_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    commands._parsed(["none.onnx", "--json", "none/result.json"])


def test_what_is_unforeseen_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(timeout_s: float) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(commands, "joined_process_group", joined)
    assert run(["none.onnx"], []) == (1, "Unforeseen KeyError: 'planted'; please report it.")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RANK", "x"), ("RANK", "-1"), ("RANK", "2"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", ""),
        ("MASTER_PORT", "70000"), ("MASTER_PORT", "0"),
    ],
)  # fmt: skip
def test_variables_that_can_not_be_are_wrong_usage(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, text in {**fine, variable: value}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=rf"^{variable} (is '{value}'|{value} is none)"):
        joined_process_group(1.0)


def test_all_hear_what_rank_0_lacks(path: Path) -> None:
    ended = command(2, path, "none@9", "--input", "x=missing.npy")
    reason = "There is no file 'missing.npy' for input 'x'; give one that numpy.save wrote."
    assert (ended[0].code, ended[0].stderr) == (2, f"onnxsched: {reason}\n")
    assert (ended[1].code, ended[1].stderr) == (1, f"onnxsched: Rank 0 failed: {reason}\n")


def test_every_kind_of_value_is_described() -> None:
    values = [np.zeros((2, 3), np.float32), {"a": 1.0, "b": 2.0}, None, [np.int64(1)]]
    assert commands._described(values) == ["float32[2, 3]", "map[2]", "nothing", ["int64[]"]]


@pytest.mark.timeout(120, method="thread")
def test_a_process_may_load_over_and_over_and_after_a_failure(path: Path) -> None:
    ended = run_ranks(2, "again", str(path), limit_s=100.0)
    assert [(process.code, process.stderr) for process in ended] == [(0, "")] * 2
    reason = "There is no file 'missing.onnx'; give the path of an ONNX model."
    assert ended[0].stdout == f"Rank 1 failed: {reason}\nkept few True\n"
    assert ended[1].stdout == f"{reason}\nkept few True\n"


def test_who_does_not_come_is_named(path: Path) -> None:
    ended = command(4, path, "absent@2", "--timeout", "3")
    for rank in (0, 1, 3):  # whose time ends first, or with the store of rank 0
        said = f"onnxsched: Rank {rank} can't join the others: rank 2 did not come "
        assert ended[rank].code == 1
        assert ended[rank].stderr.removeprefix(said) in (
            "within 3 s.\n", "before the store of the process group ended.\n"
        )  # fmt: skip
        assert ended[rank].after_s < 30


def test_a_master_that_is_not_there_is_one_sentence(path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        found = subprocess.run(
            [sys.executable, "-m", "onnxsched_runtime.distributed", str(path), "--timeout", "1"],
            env=environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            capture_output=True, text=True,
        )  # fmt: skip
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    assert found.stderr.startswith("onnxsched: Rank 1 can't join the others (")


def test_all_end_when_one_is_killed(path: Path) -> None:
    ended = command(3, path, "SIGKILL@2", "--bench")
    assert_all_end(ended, "Rank 2 has died or left while others were running.", but=2)


def test_all_end_when_one_is_killed_before_it_is_connected(path: Path) -> None:
    ended = command(2, path, "connect@1", "--timeout", "2")
    sentence = "Rank 1 has given no sign of life for 2 s; it died or hangs."
    assert_all_end(ended, sentence, but=1)


def test_all_end_when_the_one_with_the_store_is_killed(path: Path) -> None:
    ended = command(2, path, "SIGKILL@0", "--bench")
    assert ended[1].code == 1
    assert ended[1].stderr.startswith("onnxsched: Rank 0")
    assert "died" in ended[1].stderr
    assert ended[1].stderr.count("\n") == 1


def test_all_end_when_the_one_with_the_store_is_stopped(path: Path) -> None:
    ended = command(2, path, "SIGSTOP@0", "--bench", "--timeout", "2")
    sentence = (
        "Rank 0, or the launcher that keeps the store of the process group, has died: the store "
        "does not answer."
    )
    assert_all_end(ended, sentence, but=0)


def test_groups_of_some_and_of_all_take_turns(path: Path) -> None:
    ended = run_ranks(3, "groups", str(path))
    assert [(process.code, process.stderr) for process in ended] == [(0, "")] * 3
    refused = "This process is not in the process group; only members can load."
    assert [process.stdout for process in ended] == [
        "run|run|run\n", "run|run|run\n", f"{refused}|run|{refused}\n",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [3, 5])
def test_a_tensor_that_is_not_as_declared_ends_all(size: int, tmp_path: Path) -> None:
    model = parsed(
        "(float[4] x, bool[4] keep) => (float[n] y) {"
        " a = Relu(x)  some = Compress<axis = 0>(a, keep)  b = Neg(some)  y = Abs(b) }"
    )
    name_nodes(model)
    for tensor in ("some", "b"):
        declared = helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [size])
        model.graph.value_info.append(declared)
    annotation = annotation_of(model, (0,))
    later = dict.fromkeys(["Neg_b", "Abs_y"], Placement(Device("cpu", 1), 0))
    write_annotation(model, replace(annotation, placements={**annotation.placements, **later}))
    path = saved(model, tmp_path)
    np.save(tmp_path / "keep.npy", np.ones(4, bool))
    ended = command(2, path, "none@9", "--input", f"keep={tmp_path / 'keep.npy'}")
    assert {process.code for process in ended} == {1}
    sentence = f"'some' has shape [4], but the model says [{size}]."
    assert all(process.stderr.endswith(f" failed: {sentence}\n") for process in ended)


def test_all_end_when_one_hangs(path: Path) -> None:
    ended = command(2, path, "hang@1", "--bench", "--timeout", "2")
    assert_all_end(ended, "Rank 1 has not got on in run 1 for 2 s; it hangs.")


def test_all_end_when_one_is_stopped(path: Path) -> None:
    ended = command(2, path, "SIGSTOP@1", "--bench", "--timeout", "2")
    sentence = "Rank 1 has given no sign of life for 2 s; it died or hangs."
    assert_all_end(ended, sentence, but=1)


def test_all_end_when_one_fails(path: Path) -> None:
    ended = command(2, path, "fail@1", "--bench")
    assert_all_end(ended, "Rank 1 failed: ONNX Runtime failed: planted.")


def test_all_hear_why_one_can_not_load(path: Path) -> None:
    told = "ONNX Runtime refuses the model (planted)."
    ended = command(2, path, "load@1", "--bench")
    assert_all_end(ended, f"Rank 1 failed: {told}", but=1)
    own = f"ONNX Runtime refuses '{path}' (planted)."
    assert (ended[1].code, ended[1].stderr) == (5, f"onnxsched: {own}\n")


def test_all_hear_of_what_is_unforeseen_at_once(path: Path) -> None:
    ended = command(2, path, "unforeseen@1", "--bench")
    assert_all_end(ended, "Rank 1 failed: planted in two lines", but=1)
    own = "Unforeseen ValueError: planted in two lines; please report it."
    assert (ended[1].code, ended[1].stderr) == (1, f"onnxsched: {own}\n")
    assert ended[0].after_s < 15


def test_another_version_is_refused(path: Path) -> None:
    ended = command(3, path, "version@2")
    (sentence,) = {process.stderr for process in ended}
    assert [process.code for process in ended] == [1] * 3
    assert sentence.startswith("onnxsched: Rank 2 has another version of onnxsched (0.0.7) than ")
