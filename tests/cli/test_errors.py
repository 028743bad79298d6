"""Whatever goes wrong ends in one sentence, an exit code, and files as they were."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxsched import checking, pipeline
from onnxsched.cli import run
from onnxsched.comparison import Difference
from sample_models import build
from support.optimizing import contents, parsed, saved, workplace

QUICK = ("--warmup", "0", "--duration", "0", "--iterations", "20")
OPTIMIZE = ("optimize", "tiny.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with what wrong commands are given."""
    folder = workplace(tmp_path_factory.mktemp("prepared"))
    np.save(folder / "small.npy", np.zeros(3, np.float32))
    np.savez(folder / "several.npz", a=np.zeros(3), b=np.zeros(3))
    saved(parsed("(float[n] x) => (float[n] y) { y = Exp(x) }"), folder, "symbolic.onnx")
    scheduled = onnx.load(folder / "out.onnx")
    renamed = onnx.load(folder / "out.onnx")
    renamed.graph.node[0].name += "_renamed"
    saved(renamed, folder, "renamed.onnx")
    nameless = onnx.load(folder / "out.onnx")
    (table,) = (e for e in nameless.metadata_props if e.key == "onnxsched.schedule")
    table.value = "{}"
    saved(nameless, folder, "nameless.onnx")
    mixed = onnx.load(folder / "out.onnx")
    (device,) = (e for e in mixed.graph.node[-1].metadata_props if e.key == "onnxsched.device")
    device.value = "cuda:0"
    saved(mixed, folder, "mixed.onnx")
    saved(parsed("(float[3] x) => (float[3] y) { y = local.Odd(x) }"), folder, "strange.onnx")
    odd = build("tiny")
    odd.opset_import.append(onnx.helper.make_opsetid("local", 1))
    odd.graph.node[0].domain = "local"
    saved(odd, folder, "stranger.onnx")
    weight = max(scheduled.graph.initializer, key=lambda w: w.ByteSize())
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 1, weight.name)
    )
    saved(scheduled, folder, "trained.onnx")
    sequence = parsed("(seq(float[2]) s) => (int64 y) { y = SequenceLength(s) }")
    saved(sequence, folder, "sequence.onnx")
    saved(parsed("(float[3] x) => () { y = Exp(x) }"), folder, "mute.onnx")
    saved(build("tiny", image=32), folder, "larger.onnx")
    flat = parsed("(float[3] input) => (float[3] logits) { logits = Exp(input) }")
    saved(flat, folder, "flat.onnx")
    stranger = build("tiny")
    stranger.graph.node[-1].output[0] = stranger.graph.output[0].name = "other"
    saved(stranger, folder, "renamed_output.onnx")
    (folder / "partial.json").write_text(
        '{"schema_version": 1, "operators": [{"name": "stem/conv", "device": "cpu", "stream": 0}]}'
    )
    (folder / "gpu.json").write_text(
        '{"schema_version": 1, "operators": [{"name": "a", "device": "cuda:9", "stream": 0}]}'
    )
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "link.onnx").symlink_to("out.onnx")
    (folder / "link.weights").symlink_to("folder/weights")
    split = onnx.load(folder / "out.onnx")
    onnx.save(split, folder / "split.onnx", save_as_external_data=True,
              location="folder/weights", size_threshold=0)  # fmt: skip
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace, which every command runs in."""
    copy = tmp_path / "work"
    shutil.copytree(prepared, copy, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(copy / "pipe")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit code and the sentence of a command, which must leave all files as they were."""

    def failed(*arguments: str) -> tuple[int, str]:
        before = contents(folder)
        code = run(list(arguments))
        assert contents(folder) == before
        return code, sentence(capsys)

    return failed


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("onnxsched: ")
    assert printed.err.endswith(".\n")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("onnxsched: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("optimize",), "Missing argument 'IN'"),
        (("optimize", "tiny.onnx"), "Missing option '--output'"),
        ((*OPTIMIZE, "--colour", "red"), "No such option: --colour"),
        ((*OPTIMIZE, "--streams", "many"), "Invalid value for '--streams'"),
        ((*OPTIMIZE, "--streams", "0"), "--streams 0 is no number from 1 to 1024"),
        ((*OPTIMIZE, "--policy", "magic"), "no policy 'magic'"),
        ((*OPTIMIZE, "--device", "tpu"), "'tpu' is no device"),
        ((*OPTIMIZE, "--device", "gpu"), "write auto, cpu, cuda:INDEX, or several, such as cuda"),
        ((*OPTIMIZE, "--device", "cpu:0,cpu:0"), "names cpu:0 twice"),
        ((*OPTIMIZE, "--device", "cpu:0,cuda:1"), "mixes cpu:0 and cuda:1"),
        (("verify", "tiny.onnx", "tiny.onnx", "--device", "cpu:0,cpu:1"), "runs on one"),
        ((*OPTIMIZE, "--schedule", "none.json"), "no file 'none.json' to read a schedule from"),
        ((*OPTIMIZE, "--schedule", "tiny.onnx"), "'tiny.onnx' is no schedule: "),
        ((*OPTIMIZE, "--schedule", "partial.json"), "not place operator 'branch1"),
        ((*OPTIMIZE, "--schedule", "partial.json", "--policy", "heft"), "--policy contradict"),
        ((*OPTIMIZE, "--schedule", "partial.json", "--streams", "2"), "--streams contradict"),
        (("inspect", "out.onnx", "--schedule", "none/s.json"), "There is no folder"),
        (("inspect", "out.onnx", "--schedule", "folder"), "--schedule 'folder' is a folder"),
        (("inspect", "out.onnx", "--json", "none/result.json"), "There is no folder"),
        (("inspect", "out.onnx", "--json", "file/result.json"), "There is no folder"),
        (("inspect", "out.onnx", "--json", f"{'n' * 300}/result.json"), "There is no folder"),
        (("inspect", "out.onnx", "--json", "folder"), "--json 'folder' is a folder"),
        (("inspect", "out.onnx", "--json", ""), "--json '' is a folder"),
        (("verify", "out.onnx", "tiny.onnx", "--json", "none/r.json"), "There is no folder"),
        (("verify", "out.onnx", "tiny.onnx", "--json", "folder"), "is a folder"),
        (("bench", "out.onnx", "--json", "folder"), "is a folder"),
        ((*OPTIMIZE, "--json", "folder"), "is a folder"),
        (("doctor", "--json", "none/result.json"), "There is no folder"),
        (("doctor", "--json", "folder"), "is a folder"),
        ((*OPTIMIZE, "--shape", "input"), "--shape input can't be read"),
        ((*OPTIMIZE, "--shape", "input:1x3"), "2 dimensions, it has 4"),
        ((*OPTIMIZE, "--shape", "z:1x3"), "names 'z', which is no input"),
        ((*OPTIMIZE, "--cache-dir", "kept"), "--cache-dir and --no-cache contradict"),
        ((*OPTIMIZE[:-1], "--cache-dir", "file"), "--cache-dir 'file' can't keep measurements"),
        ((*OPTIMIZE[:-1], "--cache-dir", "file/deep"), "measurements (Not a directory); choose"),
        ((*OPTIMIZE[:-1], "--cache-dir", "/proc/foo"), "'/proc/foo' can't keep measurements"),
        ((*OPTIMIZE[:-1], "--cache-dir", "n" * 300), "measurements (File name too long)"),
        ((*OPTIMIZE, "--custom-ops", "none.so"), "library 'none.so' does not load"),
        ((*OPTIMIZE, "-o", "none/new.onnx"), "There is no folder"),
        ((*OPTIMIZE, "-o", "."), "is a folder"),
        (("optimize", "tiny.onnx", "-o", "-"), "--output - is no file, and stdout takes no model"),
        (("strip", "out.onnx", "-o", "-"), "--output - is no file, and stdout takes no models"),
        (("inspect", "out.onnx", "--schedule", "-"), "--schedule - is no file, and stdout shows"),
        (("run", "out.onnx", "--input", "input=pipe"), "'pipe' is no regular file for input 'in"),
        ((*OPTIMIZE, "--schedule", "pipe"), "'pipe' is no regular file to read a schedule from"),
        (("optimize", "none.onnx", "-o", "new.onnx"), "There is no file 'none.onnx'"),
        (("optimize", "symbolic.onnx", "-o", "new.onnx"), "have no value: x[0] ('n')"),
        (("bench", "none.onnx"), "There is no file 'none.onnx'"),
        (("bench", "out.onnx", "--against", "ort,magic"), "no arm 'magic'"),
        (("bench", "out.onnx", "--original", "none.onnx"), "There is no file 'none.onnx'"),
        (("bench", "out.onnx", "--original", "other.onnx"), "'other.onnx' has other inputs"),
        (("bench", "out.onnx", "--original", "larger.onnx"), "'larger.onnx' do not take"),
        (("bench", "out.onnx", "--original", "flat.onnx"), "'flat.onnx' do not take"),
        (("bench", "out.onnx", "--throughput", "--against", "ort"), "and --against contradict"),
        (("bench", "out.onnx", "--throughput", "--original", "tiny.onnx"), "and --original"),
        (("bench", "out.onnx", "--throughput", "--warmup", "200"), "and --warmup contradict"),
        (("bench", "out.onnx", "--throughput", "--iterations", "100"), "and --iterations"),
        (("bench", "out.onnx", "--throughput", "--fail-under", "9"), "and --fail-under"),
        (("run", "none.onnx"), "There is no file 'none.onnx'"),
        (("run", "out.onnx", "--input", "input"), "--input input can't be read"),
        (("run", "out.onnx", "--input", "=x.npy"), "--input =x.npy can't be read"),
        (("run", "out.onnx", "--input", "input=none.npy"), "no file 'none.npy' for input 'input'"),
        (("run", "out.onnx", "--input", "input=tiny.onnx"), "'tiny.onnx' is no .npy file"),
        (("run", "out.onnx", "--input", "input=several.npz"), "several arrays"),
        (("run", "out.onnx", "--input", "input=small.npy"), "takes shape [1, 3, 16, 16], got [3]"),
        (("run", "out.onnx", "--input", "z=small.npy"), "no input 'z'"),
        (("run", "out.onnx", *("--input", "input=small.npy") * 2), "--input gives 'input' twice"),
        ((*OPTIMIZE, "--input", "input"), "--input input can't be read"),
        ((*OPTIMIZE, "--input", "input=small.npy"), "takes shape [1, 3, 16, 16], got [3]"),
        (("bench", "out.onnx", "--input", "z=small.npy"), "no input 'z'"),
        (("verify", "out.onnx", "tiny.onnx", "--input", "z=small.npy"), "no input 'z'"),
        (("verify", "out.onnx", "none.onnx"), "There is no file 'none.onnx'"),
        (("verify", "out.onnx", "other.onnx"), "have different inputs"),
        (("verify", "out.onnx", "larger.onnx"), "no fixed shapes that both models share"),
        (("verify", "tiny.onnx", "larger.onnx"), "different inputs: ['input float[1x3x16x16]']"),
        (("verify", "tiny.onnx", "renamed_output.onnx"), "different outputs: ['logits'] and"),
        (("verify", "symbolic.onnx", "symbolic.onnx"), "optimize one of the models"),
        (("verify", "out.onnx", "tiny.onnx", "--runs", "0"), "Invalid value for '--runs'"),
        (("verify", "out.onnx", "tiny.onnx", "--rtol", "small"), "--rtol small can't be read"),
        (("verify", "out.onnx", "tiny.onnx", "--atol", "y:-1"), "--atol y:-1 can't be read"),
        (("verify", "out.onnx", "tiny.onnx", "--atol", "nan"), "--atol nan can't be read"),
        (("verify", "out.onnx", "tiny.onnx", "--rtol", "nope:0.5"), "--rtol names 'nope', which"),
        (("verify", "out.onnx", "tiny.onnx", "--atol", "typo:1"), "the outputs are ['logits']"),
        (("inspect", "none.onnx"), "There is no file 'none.onnx'"),
        (("strip", "none.onnx", "-o", "new.onnx"), "There is no file 'none.onnx'"),
        (("restore", "none.onnx", "-o", "new.onnx"), "There is no file 'none.onnx'"),
        (("strip", "out.onnx", "-o", "none/new.onnx"), "There is no folder"),
        (("strip", "out.onnx", "-o", "folder"), "--output 'folder' is a folder"),
        (("restore", "out.onnx", "-o", "file/new.onnx"), "There is no folder"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(arguments: tuple[str, ...], message: str, fail: Any) -> None:
    code, text = fail(*arguments)
    assert code == 2
    assert message in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "out.onnx", "--json", "out.onnx"),
        ("inspect", "out.onnx", "--json", "link.onnx"),
        ("inspect", "link.onnx", "--json", "out.onnx"),
        ("inspect", "out.onnx", "--schedule", "out.onnx"),
        ("inspect", "out.onnx", "--schedule", "folder/../out.onnx"),
        ("inspect", "out.onnx", "--schedule", "a.json", "--json", "folder/../a.json"),
        ("verify", "out.onnx", "tiny.onnx", "--json", "out.onnx"),
        ("verify", "out.onnx", "tiny.onnx", "--json", "./tiny.onnx"),
        ("bench", "out.onnx", "--json", "out.onnx"),
        ("bench", "out.onnx", "--original", "tiny.onnx", "--json", "tiny.onnx"),
        ("bench", "out.onnx", "--custom-ops", "file", "--json", "file"),
        (*OPTIMIZE, "--json", "folder/../tiny.onnx"),
        (*OPTIMIZE, "--json", "folder/../new.onnx"),
        (*OPTIMIZE, "--schedule", "partial.json", "--json", "partial.json"),
        (*OPTIMIZE, "--schedule", "partial.json", "-o", "folder/../partial.json"),
        ("optimize", "split.onnx", "--device", "cpu", "-o", "folder/weights"),
        ("optimize", "split.onnx", "-o", "new.onnx", "--json", "folder/weights"),
        ("strip", "split.onnx", "-o", "folder/weights"),
        ("strip", "split.onnx", "-o", "link.weights"),
        ("restore", "split.onnx", "-o", "folder/../folder/weights"),
        ("inspect", "split.onnx", "--json", "folder/weights"),
        ("inspect", "split.onnx", "--schedule", "folder/weights"),
        ("verify", "out.onnx", "split.onnx", "--json", "folder/weights"),
        ("bench", "out.onnx", "--original", "split.onnx", "--json", "folder/weights"),
    ],
    ids=" ".join,
)
def test_a_file_that_a_command_needs_is_not_overwritten(
    arguments: tuple[str, ...], fail: Any
) -> None:
    code, text = fail(*arguments)
    assert code == 2
    assert f"{arguments[-2]} '{arguments[-1]}'".replace("-o ", "--output ") in text
    assert "is a file that this command reads or writes, too; give another" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "garbage.onnx", "-o", "new.onnx"), "can't be read as an ONNX model"),
        (("optimize", "mute.onnx", "-o", "new.onnx"), "'mute.onnx' has no outputs"),
        (("inspect", "garbage.onnx"), "can't be read as an ONNX model"),
        (("bench", "tiny.onnx"), "'tiny.onnx' carries no onnxsched schedule; run `onnxsched opti"),
        (("bench", "tiny.onnx", "--throughput"), "'tiny.onnx' carries no onnxsched schedule"),
        (("run", "tiny.onnx"), "'tiny.onnx' carries no onnxsched schedule"),
        (("inspect", "tiny.onnx"), "'tiny.onnx' carries no onnxsched schedule"),
        (("restore", "tiny.onnx", "-o", "new.onnx"), "'tiny.onnx' carries no onnxsched schedule"),
        (("run", "nameless.onnx"), "The schedule of 'nameless.onnx' is damaged (field 'nodes' is"),
        (("verify", "nameless.onnx", "tiny.onnx"), "The schedule of 'nameless.onnx' is damaged"),
        (("run", "mixed.onnx"), "The schedule of 'mixed.onnx' is damaged (it uses cpu:0, cuda:0"),
        (("inspect", "mixed.onnx"), "and GPUs and the CPU can't share a model)"),
        (("optimize", "strange.onnx", "-o", "new.onnx"), "ONNX Runtime refuses 'strange.onnx': "),
        (("verify", "strange.onnx", "strange.onnx"), "ONNX Runtime refuses 'strange.onnx': "),
        (("bench", "out.onnx", "--original", "stranger.onnx"), "Runtime refuses 'stranger.onnx'"),
        (("run", "renamed.onnx"), "The schedule of 'renamed.onnx' was made for another graph"),
        (("bench", "renamed.onnx"), "was made for another graph"),
        (("inspect", "renamed.onnx"), "was made for another graph"),
        (("verify", "renamed.onnx", "tiny.onnx"), "was made for another graph"),
        (("verify", "sequence.onnx", "sequence.onnx"), "Input 's' is a sequence"),
        (("optimize", "sequence.onnx", "-o", "new.onnx"), "Input 's' of 'sequence.onnx' is a"),
    ],
)
def test_a_model_that_does_not_do_is_5(
    arguments: tuple[str, ...], message: str, fail: Any
) -> None:
    code, text = fail(*arguments)
    assert code == 5
    assert message in text


@pytest.mark.parametrize("device", ["cuda:9", "cpu:1"])
def test_a_device_that_is_not_there_is_4(device: str, fail: Any) -> None:
    code, text = fail(*OPTIMIZE, "--device", device)
    assert code == 4
    assert device in text


@pytest.mark.parametrize(
    ("devices", "missing"), [("cuda:8,cuda:9", "cuda:8"), ("cpu,cpu:2", "cpu:2")]
)
def test_one_of_several_that_is_not_there_is_4(devices: str, missing: str, fail: Any) -> None:
    code, text = fail(*OPTIMIZE, "--device", devices)
    assert code == 4
    assert f"Device {missing} is not available" in text


def test_a_device_of_a_schedule_file_that_is_not_there_is_4(fail: Any) -> None:
    optimize = OPTIMIZE[:4]
    code, text = fail(*optimize, "--no-cache", "--schedule", "gpu.json")
    assert code == 4
    assert "Device cuda:9 is not available" in text


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_on_a_machine_without_is_4(
    device: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = fail(*OPTIMIZE, "--device", device)
    assert code == 4
    assert "cuda:0 is not available: this machine has no CUDA device" in text


def test_numbers_that_differ_are_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert run(["verify", "trained.onnx", "tiny.onnx", "--device", "cpu"]) == 3
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[-1] == "NO"
    assert "Output 'logits' of 'trained.onnx' differs from 'tiny.onnx'" in printed.err
    assert printed.err.count("\n") == 1
    assert contents(folder) == before
    assert run(["verify", "trained.onnx", "tiny.onnx", "--device", "cpu", "--atol", "1e9"]) == 0


def test_a_schedule_that_changes_numbers_is_3_and_is_not_written(
    fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Difference("logits", 1.0, 1.0, False, False)
    monkeypatch.setattr(checking, "compare", lambda *_: (wrong,))
    code, text = fail(*OPTIMIZE)
    assert code == 3
    assert "nothing was written" in text
    assert fail(*OPTIMIZE, "-o", "tiny.onnx")[0] == 3


def test_a_schedule_that_is_too_slow_is_6(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "out.onnx", *QUICK, "--fail-under", "1000"]) == 6
    printed = capsys.readouterr()
    assert printed.out.startswith("arm ")
    assert "below the 1000 that --fail-under asks for" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (*OPTIMIZE, "-o", "pipe"),
        ("optimize", "garbage.onnx", "-o", "pipe"),
        ("optimize", "garbage.onnx", "-o", "new.onnx", "--json", "pipe"),
        ("optimize", "garbage.onnx", "-o", "/dev/null"),
        ("optimize", "garbage.onnx", "-o", "/proc/new.onnx"),
        ("optimize", "garbage.onnx", "-o", "n" * 300),
        ("strip", "garbage.onnx", "-o", "pipe"),
        ("restore", "garbage.onnx", "-o", "pipe"),
        ("inspect", "garbage.onnx", "--schedule", "/proc/schedule.json"),
        ("strip", "out.onnx", "-o", "pipe"),
        ("run", "out.onnx", "--output-dir", "file/deep"),
        ("inspect", "out.onnx", "--json", "pipe"),
        ("inspect", "out.onnx", "--schedule", "pipe"),
        ("inspect", "out.onnx", "--json", "n" * 300),
    ],
)
def test_what_cannot_be_written_is_1(arguments: tuple[str, ...], folder: Path, fail: Any) -> None:
    code, text = fail(*arguments)
    assert code == 1
    assert "can't be written" in text


def test_a_special_file_for_json_is_told_of_stdout(fail: Any) -> None:
    assert fail("inspect", "out.onnx", "--json", "pipe") == (
        1, "--json 'pipe' can't be written (it is no regular file); choose another, or --json - "
        "for stdout.",
    )  # fmt: skip


def test_a_full_disk_is_1_and_leaves_the_old_file(
    fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, text = fail("strip", "out.onnx", "-o", "out.onnx")
    assert (code, text) == (
        1, "'out.onnx' can't be written (No space left on device); choose another.",
    )  # fmt: skip


@pytest.mark.parametrize("target", [".", "results", "results/deep", "folder/deep"])
def test_outputs_are_written_all_or_none(
    target: str, folder: Path, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, array: Any, allow_pickle: bool) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    before = sorted(folder.rglob("*"))
    code, text = fail("run", "out.onnx", "--output-dir", target)
    assert (code, text) == (
        1, f"The outputs can't be written to '{target}' (No space left on device); choose "
        "another folder.",
    )  # fmt: skip
    assert sorted(folder.rglob("*")) == before


def test_a_disk_that_fills_up_is_called_that(fail: Any) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        code, text = fail("run", "out.onnx", "--output-dir", "results")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (code, text) == (
        1, "The outputs can't be written to 'results' (File too large); choose another folder.",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written."),
        (MemoryError(), 1, "Memory ran out"),
        (RuntimeError("several\nlines of\ntext"), 1, "Unforeseen RuntimeError: several lines of"),
        (ValueError(), 1, "Unforeseen ValueError: no message; please report it."),
    ],
)
def test_what_nobody_foresaw_ends_in_a_sentence_too(
    error: BaseException, code: int, message: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "check_numerics", raising)
    found, text = fail(*OPTIMIZE)
    assert found == code
    assert message in text
