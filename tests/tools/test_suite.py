"""The benchmark suite on the CPU: from models to results, resumed, limited, refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxsched.policies import POLICIES
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import NumericsError
from sample_models import MODELS, build
from support.optimizing import loaded, saved
from tools import suite, suite_worker
from tools.peers import ARMS, is_possible, open_arm
from tools.suite_worker import Job

CPU, GPU = Device("cpu"), Device("cuda")
QUICK = ("--models", "tiny", "--batches", "2", "--device", "cpu", "--image", "17",
         "--iterations", "20", "--warmup-ms", "1")  # fmt: skip


def run(out: Path, *options: str) -> dict[str, Any]:
    """The content of the result file after a run of the suite."""
    suite.main(["--out", str(out), *QUICK, *options])
    content: dict[str, Any] = json.loads((out / "suite.json").read_text())
    return content


def test_a_worker_that_is_asked_for_no_job_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["no job"], ["[1]"], ['{"a": 1}'], ["{}", "{}"]):
        with pytest.raises(SystemExit, match="2"):
            suite_worker._asked(arguments)
    assert "The argument is no job; tools/suite.py starts" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        suite_worker._asked(["--help"])
    assert not stop.value.code
    assert "JSON object with the fields of `Job`" in capsys.readouterr().out


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of three arms."""
    out = tmp_path_factory.mktemp("suite")
    return out, run(out, "--arms", "nimble,torch-eager,auto", "--workers", "2")


def test_every_arm_is_measured_beside_the_reference(first: tuple[Path, dict[str, Any]]) -> None:
    out, report = first
    assert report["environment"]["onnxruntime"]
    assert report["environment"]["torch"]
    assert [entry["arm"] for entry in report["results"]] == ["torch-eager", "auto", "nimble"]
    for entry in report["results"]:
        assert entry["error"] is None
        assert (entry["model"], entry["batch"], entry["image"]) == ("tiny", 2, 17)
        assert entry["time"]["count"] == entry["reference"]["count"] == 20
        assert 0 < entry["ratio"]["low"] <= entry["ratio"]["high"]
        assert 0 <= entry["relative_difference"] < 1e-4
        assert entry["memory_nbytes"] is None
    assert "| tiny | 2 |" in (out / "suite.md").read_text()


def test_our_arms_say_how_they_were_made(first: tuple[Path, dict[str, Any]]) -> None:
    auto, nimble = first[1]["results"][1:]
    assert {a["policy"] for a in auto["alternatives"]} <= {*POLICIES}
    assert {a["policy"] for a in nimble["alternatives"]} == {"sequential", "nimble"}
    assert nimble["policy"] == "nimble"
    assert (auto["is_profile_cached"], nimble["is_profile_cached"]) == (False, True)
    for entry in (auto, nimble):
        assert entry["optimize_s"] > 0
        assert 0 < entry["critical_path_us"] <= entry["predicted_us"] + 1e-6
        assert entry["predicted_us"] <= entry["operator_sum_us"] + 1e-6


def test_a_run_goes_on_where_one_ended(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first[0], tmp_path, dirs_exist_ok=True)
    again = run(tmp_path, "--resume", "--arms", "torch-eager,auto,nimble,ort")
    assert again["results"][:3] == first[1]["results"]
    assert [entry["arm"] for entry in again["results"][3:]] == ["ort"]
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["tiny", "2", "ort"]


def test_results_are_never_overwritten(first: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="add --resume to go on with it"):
        run(first[0])


def test_another_machine_is_refused(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    environment = {**first[1]["environment"], "onnxruntime": "0.1"}
    (tmp_path / "suite.json").write_text(json.dumps({**first[1], "environment": environment}))
    with pytest.raises(SystemExit, match=r"measured with onnxruntime 0\.1, this machine has"):
        run(tmp_path, "--resume", "--arms", "ort")


def test_what_takes_too_long_is_said_and_can_be_tried_again(tmp_path: Path) -> None:
    report = run(tmp_path, "--arms", "ort", "--limit", "0.1")
    assert report["results"][0]["error"] == "The step 'measure' was not finished in time."
    assert run(tmp_path, "--arms", "ort", "--resume") == report
    (entry,) = run(tmp_path, "--arms", "ort", "--resume", "--retry")["results"]
    assert entry["error"] is None


def test_no_arm_is_begun_after_the_end(tmp_path: Path) -> None:
    suite.main(["--out", str(tmp_path), *QUICK, "--stop-after", "0"])
    assert not (tmp_path / "suite.json").exists()


def test_a_worker_that_dies_is_an_arm_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\necho out of memory >&2\nexit 7\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (entry,) = run(tmp_path, "--arms", "auto")["results"]
    assert entry["error"] == "The step 'optimize' ended with code 7 (out of memory)."


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_arm_is_measured(tmp_path: Path) -> None:
    place = (
        "--arms",
        "torch-compile-frozen-nhwc",
        "--limit",
        "200",
        "--work",
        str(tmp_path / "w"),
    )
    suite.main(["--out", str(tmp_path / "out"), *QUICK, *place, "--compile-only"])
    assert not (tmp_path / "out" / "suite.json").exists()
    (entry,) = run(tmp_path / "out", *place)["results"]
    assert entry["error"] is None
    assert 0 < entry["prepare_s"] < entry["compile_s"], "it was compiled in a step before"
    assert entry["relative_difference"] < 1e-4


def test_by_default_three_models_are_measured_at_all_batches() -> None:
    options = suite._parser().parse_args(["--out", "."])
    planned = [(c.model, c.batch) for c in suite.configurations(options)]
    assert planned[: len(MODELS)] == [(name, 1) for name in MODELS]
    assert sorted(planned[len(MODELS) :]) == sorted(
        (name, batch) for name in suite.SWEPT for batch in suite.BATCHES if batch > 1
    )


@pytest.mark.parametrize("options", [("--workers", "0"), ("--compile-only",)])
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="--compile-only needs --work"):
        run(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--models", "vgg"), "There is no model 'vgg'"),
        (("--arms", "tvm"), "There is no arm 'tvm'"),
        (("--batches", "2,x"), "--batches holds 'x'"),
        (("--image", "0"), "image is 0 for tiny"),
    ],
)
def test_options_that_name_nothing_are_refused(
    tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(SystemExit, match=complaint):
        run(tmp_path, *options)
    assert not (tmp_path / "suite.json").exists()


def test_arms_that_need_a_gpu_or_images_are_left_out_without() -> None:
    assert all(is_possible(name, GPU, True) for name in ARMS)
    left = {name for name in ARMS if not is_possible(name, GPU, False)}
    assert left == {name for name in ARMS if name.endswith("-nhwc")}
    on_cpu = {name for name in ARMS if is_possible(name, CPU, True)}
    assert {"ort", "torch-eager", "torch-compile", "auto", *POLICIES} <= on_cpu
    assert not {"ort-graph", "torch-graph", "torch-reduce-overhead"} & on_cpu


def test_a_peer_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = loaded(build("tiny"), tmp_path)
    feeds = {"input": np.ones((1, 3, 16, 16), np.float32)}
    with open_arm("ort", model, CPU, feeds) as reference:
        assert suite_worker._relative_difference(model, reference, reference) == 0.0
        other = {"input": np.zeros((1, 3, 16, 16), np.float32)}
        with (
            open_arm("torch-eager", model, CPU, other) as arm,
            pytest.raises(NumericsError, match="Output 'logits' differs from ONNX Runtime's by"),
        ):
            suite_worker._relative_difference(model, arm, reference)


def test_an_arm_of_ours_needs_its_annotated_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ready = str(saved(build("tiny"), tmp_path)), str(tmp_path / "ready")
    monkeypatch.setattr(suite_worker, "_await_turn", lambda job: None)
    job = Job("measure", "auto", source, str(tmp_path / "no.onnx"), "", "cpu", "", ready)
    with pytest.raises(Exception, match=r"There is no file .*no\.onnx"):
        suite_worker.measured(job)
