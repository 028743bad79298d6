import os
import subprocess
import sys
from pathlib import Path

import pytest

import sample_models
from sample_models import build
from sample_models.command import main
from sample_models.registry import OFFERED

ROOT = Path(sample_models.__file__).parent.parent


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[object, str]:
    """Runs the command, which must fail in one sentence: gives its exit code and the sentence."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sample_models: ")
    assert printed.err.endswith(".\n")
    assert printed.err.count("\n") == 1
    return stop.value.code, printed.err


def test_without_arguments_it_lists_the_models() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sample_models"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(OFFERED)
    assert all(
        line.endswith(model.description)
        for line, model in zip(lines, OFFERED.values(), strict=True)
    )


def _shell(redirected: str, **variables: str) -> tuple[int, str]:
    """Exit code and stderr of the command with its redirections."""
    run = subprocess.run(
        f"'{sys.executable}' -m sample_models {redirected}", shell=True, cwd=ROOT,
        executable="/bin/bash", env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    return run.returncode, run.stderr


_FULL = "sample_models: cannot write to stdout: No space left on device; make room there.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirected", "ended"),
    [
        (">/dev/full", (1, _FULL)),
        ("--help >/dev/full", (1, _FULL)),
        ("| true; exit ${PIPESTATUS[0]}", (1, "")),
        (">&-", (0, "")),
        ("nope 2>&-", (2, "")),
    ],
)
def test_streams_that_take_nothing_end_in_one_sentence(
    redirected: str, ended: tuple[int, str], unbuffered: str
) -> None:
    assert _shell(redirected, PYTHONUNBUFFERED=unbuffered) == ended


@pytest.mark.parametrize("module", ["sample_models.command", "numpy", "onnx"])
def test_an_interrupt_while_modules_are_imported_is_130(module: str) -> None:
    script = (
        "import os, runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == '{module}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # nohup ignores it
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv = ['sample_models']\n"
        "runpy.run_module('sample_models', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "sample_models: interrupted; nothing was written.\n"


def test_it_writes_the_model_with_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"old")
    main(["squeezenet", "-o", str(file), "--image", "64", "--batch", "2"])
    assert file.read_bytes() == build("squeezenet", image=64, batch=2).SerializeToString()
    assert list(tmp_path.iterdir()) == [file]
    assert capsys.readouterr() == ("", "")


def test_it_writes_through_a_link(tmp_path: Path) -> None:
    link, file = tmp_path / "link.onnx", tmp_path / "model.onnx"
    link.symlink_to(file)
    main(["tiny", "-o", str(link)])
    assert link.is_symlink()
    assert file.read_bytes() == build("tiny").SerializeToString()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet", "-o", "F"], "no model 'resnet': choose one of googlenet, "),
        (["googlenet"], "no file to write googlenet to: name one with -o FILE"),
        (["-o", "F"], "the name of a model is missing: choose one of googlenet, "),
        (["googlenet", "-o", "F", "--sequence", "8"], "leave sequence out"),
        (["bert", "-o", "F", "--image", "8"], "leave image out"),
        (["tiny", "-o", "-"], "-o - is no file, and stdout takes no models"),
        (["deepfm", "-o", "F", "--batch", "0"], "batch is 0 for deepfm"),
        (["deepfm", "-o", "F", "--batch", "many"], "--batch: invalid int value: 'many'"),
        (["inception_v3", "-o", "F", "--image", "32"], "too small for inception_v3"),
        (["tiny", "-o", "F", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_usage_ends_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = _fails(capsys, *arguments)
    assert code == 2
    assert message in error
    assert not list(tmp_path.iterdir())


def test_an_unwritable_output_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for file in (tmp_path / "none" / "model.onnx", tmp_path / "file" / "model.onnx", tmp_path):
        code, error = _fails(capsys, "tiny", "-o", file)
        assert code == 1
        assert f"cannot write {file}: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = _fails(capsys, "tiny", "-o", "/dev/null")
    assert code == 1
    assert "not a regular file" in error
    assert Path("/dev/null").is_char_device()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"old")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, error = _fails(capsys, "tiny", "-o", file)
    assert code == 1
    assert f"cannot write {file}: No space left on device; " in error
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
