import subprocess
import sys
from pathlib import Path

import pytest

import sample_models
from sample_models import MODELS, build
from sample_models.__main__ import main

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
    assert [line.split()[0] for line in lines] == list(MODELS)
    assert all(
        line.endswith(model.description)
        for line, model in zip(lines, MODELS.values(), strict=True)
    )


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
