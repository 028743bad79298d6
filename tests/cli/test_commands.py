"""Every command where all goes well: the result on stdout, and nothing else anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxsched import benchmark, pipeline
from onnxsched.cli import run
from onnxsched.policies import POLICIES
from onnxsched_runtime.annotation import read_annotation
from sample_models import build
from support.models import MODELS, assert_same, feeds_for, model_of, reference
from support.optimizing import contents, parsed, plain_outputs, saved, workplace

QUICK = ("--warmup", "0", "--duration", "0", "--iterations", "20")


@pytest.fixture(autouse=True)
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The workplace, which every command runs in."""
    monkeypatch.chdir(workplace(tmp_path))
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints, which must end well and say nothing on stderr."""

    def called(*arguments: str) -> str:
        assert run(list(arguments)) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return called


def optimize(call: Any, *options: str) -> str:
    text: str = call("optimize", "tiny.onnx", "-o", "new.onnx", "--device", "cpu", *options)
    return text


def test_optimize_writes_the_model_and_says_what_it_chose(folder: Path, call: Any) -> None:
    before = contents(folder)
    text = optimize(call, "--no-cache", "--policy", "nimble", "--streams", "2")
    assert text.splitlines()[0].split() == [
        "policy/streams", "devices", "variant", "rewrite",
        "predicted", "us", "tried", "us", "measured", "us",
    ]  # fmt: skip
    assert "Chose nimble on 2 stream(s) of cpu:0, nchw:" in text
    assert "plain ONNX Runtime's. Wrote new.onnx." in text
    assert contents(folder).items() - before.items() == {
        ("new.onnx", contents(folder)["new.onnx"])
    }
    assert len(set(read_annotation(onnx.load("new.onnx")).placements.values())) == 2


def test_optimize_chooses_by_itself_and_remembers(folder: Path, call: Any) -> None:
    assert "(from the cache)" not in optimize(call, "--cache-dir", "kept")
    assert contents(folder / "kept")
    assert "(from the cache)" in optimize(call, "--cache-dir", "kept")


def test_optimize_says_that_the_default_cache_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "tiny.onnx"))
    command = ["optimize", "tiny.onnx", "-o", "new.onnx", "--device", "cpu", "--budget", "0"]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert "Wrote new.onnx." in printed.out
    assert printed.err.startswith("onnxsched: Warning: '")
    assert printed.err.endswith(
        "tiny.onnx/onnxsched' can't keep measurements (Not a directory), so the next run measures "
        "again; choose a folder with --cache-dir.\n"
    )
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_optimize_obeys_a_policy(policy: str, call: Any) -> None:
    assert f"Chose {policy} on" in optimize(call, "--no-cache", "--policy", policy)


@pytest.mark.parametrize("options", [(), ("--no-variants",)])
def test_optimize_passes_on_whether_to_try_variants(
    options: tuple[str, ...], call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = pipeline.optimize

    def noted(*arguments: Any, **named: Any) -> pipeline.OptimizeResult:
        asked.append(named["variants"])
        return real(*arguments, **named)

    monkeypatch.setattr(pipeline, "optimize", noted)
    optimize(call, "--no-cache", "--policy", "sequential", *options)
    assert asked == [not options]


def test_optimize_binds_shapes(folder: Path, call: Any) -> None:
    model = parsed("(float[n,3] x, float[m] z) => (float[n,3] y) { a = Exp(x)  y = Mul(a, x) }")
    saved(model, folder, "symbolic.onnx")
    call("optimize", "symbolic.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache",
         "--shape", "x:5x3", "--shape", "z:7")  # fmt: skip
    assert "y  float32[5, 3]" in call("run", "new.onnx")


def test_optimize_tells_of_outputs_it_could_not_compare(folder: Path, call: Any) -> None:
    model = parsed("(float[3] x) => (float[3] y) { a = Neg(x)  y = RandomNormalLike(a) }")
    saved(model, folder, "random.onnx")
    text = call("optimize", "random.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    assert "Random numbers reach every output, so none was compared. Wrote new.onnx." in text


def test_optimize_in_json(call: Any) -> None:
    content = json.loads(optimize(call, "--no-cache", "--policy", "heft", "--json", "-"))
    assert (content["policy"], content["path"]) == ("heft", "new.onnx")
    assert content["devices"] == ["cpu:0"]
    assert content["differences"][0]["is_within"]


def test_json_goes_to_a_file_beside_the_text(folder: Path, call: Any) -> None:
    before = contents(folder).keys()
    assert "Chose" in optimize(call, "--no-cache", "--json", "result.json")
    assert contents(folder).keys() - before == {"new.onnx", "result.json"}
    assert json.loads((folder / "result.json").read_text())["path"] == "new.onnx"


def test_a_schedule_goes_to_a_file_and_comes_back(folder: Path, call: Any) -> None:
    before = contents(folder)
    assert call("inspect", "out.onnx", "--schedule", "s.json") == call("inspect", "out.onnx")
    assert contents(folder).keys() - before.keys() == {"s.json"}
    text = call("optimize", "tiny.onnx", "-o", "new.onnx", "--schedule", "s.json", "--no-cache")
    assert "Chose file on 2 stream(s) of cpu:0, nchw:" in text
    placements = [read_annotation(onnx.load(name)).placements for name in ("out.onnx", "new.onnx")]
    assert list(placements[0].items()) == list(placements[1].items())


def test_several_devices_are_scheduled_and_shown(folder: Path, call: Any) -> None:
    call("inspect", "out.onnx", "--schedule", "s.json")
    content = json.loads((folder / "s.json").read_text())
    content["operators"][-1]["device"] = "cpu:1"
    (folder / "s.json").write_text(json.dumps(content))
    arguments = (
        "optimize",
        "tiny.onnx",
        "-o",
        "new.onnx",
        "--device",
        "cpu:0,cpu:1",
        "--no-cache",
    )
    text = call(*arguments, "--schedule", "s.json")
    assert "Chose file on 3 stream(s) of cpu:0, cpu:1, nchw:" in text
    text = call("inspect", "new.onnx")
    assert "cpu:1/0" in text
    shown = json.loads(call("inspect", "new.onnx", "--json", "-"))["copies"]
    assert {copy["device"] for copy in shown} == {"cpu:1"}
    assert f", {len(shown)} copies between devices" in text
    assert "(cpu:0, cpu:1), file" in call("bench", "new.onnx", *QUICK)
    assert call("run", "new.onnx") == call("run", "out.onnx")
    assert (
        call("verify", "new.onnx", "tiny.onnx", "--device", "cpu").splitlines()[1].endswith("yes")
    )
    assert "Chose " in call(*arguments, "--budget", "0")


def test_copies_through_the_host_are_told_of(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "No peer access between cuda:0-cuda:1: tensors that cross go through the host"
    for module in (pipeline, benchmark):
        monkeypatch.setattr(module, "pairs_through_host", lambda devices: ("cuda:0-cuda:1",))
    assert sentence in call("optimize", "tiny.onnx", "-o", "new.onnx", "--device", "cpu")
    assert sentence in call("bench", "new.onnx", *QUICK)


def test_bench_shows_every_arm(folder: Path, call: Any) -> None:
    before = contents(folder)
    lines = call("bench", "out.onnx", *QUICK).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["arm", "ort", "sequential", "schedule"]
    assert "out.onnx on" in lines[5]
    assert contents(folder) == before


def test_bench_against_chosen_arms_and_the_original(call: Any) -> None:
    text = call("bench", "out.onnx", "--original", "tiny.onnx", "--against", "ort", *QUICK,
                "--fail-under", "0.0001", "--json", "-")  # fmt: skip
    content = json.loads(text)
    assert content["arms"].keys() == {"ort", "schedule"}
    assert content["ratios"]["ort"]["low"] <= content["ratios"]["ort"]["high"]
    assert sum(map(len, content["arms"]["schedule"]["latency_us"])) >= 20
    assert content["policy"] == "nimble"


def test_bench_tells_how_many_requests_are_served(call: Any) -> None:
    content = json.loads(
        call("bench", "out.onnx", "--throughput", "--duration", "0.2", "--json", "-")
    )
    assert {load["arm"] for load in content["loads"]} == {"schedule", "sequential"}
    lines = call("bench", "out.onnx", "--throughput", "--duration", "0.2").splitlines()
    assert lines[0].split() == ["arm", "in", "flight", "requests/s", "latency", "us", "p99", "us"]
    assert "most requests with" in lines[-1]


def test_run_draws_inputs_and_shows_outputs(call: Any) -> None:
    first = call("run", "out.onnx")
    assert first.startswith("logits  float32[1, 10]  min ")
    assert call("run", "out.onnx") == first
    assert call("run", "out.onnx", "--seed", "1") != first


def test_run_shows_infinities(folder: Path, call: Any) -> None:
    saved(parsed("(float[2] x) => (float[2] y) { y = Log(x) }"), folder, "log.onnx")
    call("optimize", "log.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    np.save("x.npy", np.array([0, np.inf], np.float32))
    assert call("run", "new.onnx", "--input", "x=x.npy") == (
        "y  float32[2]  min -inf  mean nan  max inf\n"
    )


def test_run_reads_and_writes_arrays(folder: Path, call: Any) -> None:
    feeds = feeds_for(build("tiny"), seed=3)
    np.save("input.npy", feeds["input"])
    call("run", "out.onnx", "--input", "input=input.npy", "--output-dir", "results/deep")
    assert contents(folder / "results").keys() == {"deep/logits.npy"}
    expected = plain_outputs(folder / "tiny.onnx", feeds)
    assert_same([np.load("results/deep/logits.npy")], expected)


def test_run_gives_each_output_a_file_of_its_own(folder: Path, call: Any) -> None:
    model = model_of(
        "(float[3] x) => (float[3] p, float[3] q, float[3] r) {p = Neg(x) q = Exp(x) r = Abs(x)}"
    )
    for node, value, name in zip(
        model.graph.node, model.graph.output, ("a/b", "a:b", "a_b"), strict=True
    ):
        node.output[0] = value.name = name
    feeds = feeds_for(model)
    np.save("x.npy", feeds["x"])
    saved(model, folder, "names.onnx")
    call("optimize", "names.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    call("run", "new.onnx", "--input", "x=x.npy", "--output-dir", "results")
    files = ("a_b.npy", "a_b_.npy", "a_b__.npy")
    assert contents(folder / "results").keys() == {*files}
    assert_same([np.load(folder / "results" / file) for file in files], reference(model, feeds))


def test_run_writes_the_elements_of_a_sequence(folder: Path, call: Any) -> None:
    saved(MODELS["sequence"](), folder, "sequence.onnx")
    call("optimize", "sequence.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    assert "parts  sequence of 2\n" in call("run", "new.onnx", "--output-dir", "results")
    assert contents(folder / "results").keys() == {
        "y.npy", "z.npy", "parts.0.npy", "parts.1.npy",
    }  # fmt: skip


@pytest.mark.parametrize(
    "models",
    [
        ("out.onnx", "tiny.onnx"),
        ("tiny.onnx", "out.onnx"),
        ("out.onnx", "out.onnx"),
        ("tiny.onnx", "tiny.onnx"),
    ],
)
def test_verify_compares_scheduled_and_plain_models(models: tuple[str, str], call: Any) -> None:
    text = call("verify", *models, "--device", "cpu", "--runs", "2")
    assert text.splitlines()[1].split()[0::3] == ["logits", "yes"]


def test_verify_takes_a_model_whose_nodes_have_one_name(folder: Path, call: Any) -> None:
    model = build("tiny")
    for node in model.graph.node[:3]:
        node.name = "same"
    saved(model, folder, "same.onnx")
    call("optimize", "same.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    text = call("verify", "new.onnx", "same.onnx", "--device", "cpu", "--runs", "1")
    assert text.splitlines()[1].split()[0::3] == ["logits", "yes"]


def test_verify_takes_tolerances_by_name_and_writes_json(call: Any) -> None:
    relative = ("--rtol", "0.5", "--rtol", "logits:1e-4")
    absolute = ("--atol", "1e-5", "--atol", "logits:1e-6")
    text = call("verify", "out.onnx", "tiny.onnx", *relative, *absolute, "--json", "-")
    (entry,) = json.loads(text)["outputs"]
    assert (entry["output"], entry["is_within"]) == ("logits", True)


def test_numbers_that_json_does_not_have_are_null(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(parsed("(float[2] x) => (int64[2] y) { y = Cast<to=7>(x) }"), folder, "cast.onnx")
    saved(parsed("(float[2] x) => (int64[2] y) { z = Shape(x)  y = Add(z, z) }"), folder, "b.onnx")
    arguments = ["verify", "cast.onnx", "b.onnx", "--device", "cpu", "--json"]
    assert run([*arguments, "-"]) == 3
    printed = capsys.readouterr().out
    assert run([*arguments, "result.json"]) == 3
    assert printed == (folder / "result.json").read_text()
    (entry,) = json.loads(printed, parse_constant=pytest.fail)["outputs"]
    assert (entry["max_absolute"], entry["relative"]) == (None, None)


def test_inspect_shows_streams(call: Any) -> None:
    text = call("inspect", "out.onnx")
    assert text.startswith("policy nimble, ")
    assert "cpu:0/0" in text
    assert "cpu:0/1" in text
    assert "Not captured" not in text


def test_inspect_says_why_operators_stay_on_the_host(folder: Path, call: Any) -> None:
    saved(MODELS["branch"](), folder, "branch.onnx")
    call("optimize", "branch.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    text = call("inspect", "new.onnx")
    assert "Not captured:\n  If_2: If decides at run time what to execute\n" in text


def test_inspect_in_json_names_every_node(call: Any) -> None:
    content = json.loads(call("inspect", "out.onnx", "--json", "-"))
    names = [node["name"] for node in content["nodes"]]
    assert set(names) == set(read_annotation(onnx.load("out.onnx")).placements)
    assert [node["order"] for node in content["nodes"]] == list(range(len(names)))
    assert {name for segment in content["segments"] for name in segment["nodes"]} == set(names)
    assert all(node["duration_us"] > 0 for node in content["nodes"])


def test_strip_removes_the_schedule(folder: Path, call: Any) -> None:
    assert call("strip", "out.onnx", "-o", "bare.onnx") == (
        "Removed the schedule; wrote bare.onnx.\n"
    )
    assert b"onnxsched." not in (folder / "bare.onnx").read_bytes()
    feeds = feeds_for(build("tiny"))
    assert_same(
        plain_outputs(folder / "bare.onnx", feeds), plain_outputs(folder / "tiny.onnx", feeds)
    )
    assert call("strip", "bare.onnx", "-o", "bare.onnx").startswith("There was no schedule")


def test_restore_brings_lost_keys_back(folder: Path, call: Any) -> None:
    model = onnx.load("out.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    saved(model, folder, "lost.onnx")
    count = len(model.graph.node)
    assert call("restore", "lost.onnx", "-o", "lost.onnx") == (
        f"Restored the keys of {count} nodes; wrote lost.onnx.\n"
    )
    assert all(node.metadata_props for node in onnx.load("lost.onnx").graph.node)
    assert call("restore", "out.onnx", "-o", "again.onnx").startswith("Restored the keys of 0")


def test_doctor_lists_what_there_is(call: Any) -> None:
    text = call("doctor")
    assert "onnxruntime: " in text
    assert "This machine can make and run " in text
    content = json.loads(call("doctor", "--json", "-"))
    assert content["is_gpu_ready"] == (content["cuda_provider"] == "loads")


def test_the_version_is_one_line(call: Any) -> None:
    assert len(call("--version").splitlines()) == 1


def test_help_is_shown_where_nothing_is_asked_for(call: Any) -> None:
    text = call()
    assert text == call("--help")
    assert text.startswith("Usage: onnxsched")


@pytest.mark.parametrize(
    "command", ["optimize", "bench", "run", "verify", "inspect", "strip", "restore", "doctor"]
)
def test_every_command_explains_itself(command: str, call: Any) -> None:
    assert command in call("--help")
    assert call(command, "--help").startswith(f"Usage: onnxsched {command}")


def test_help_names_every_policy_and_cuts_no_summary(call: Any) -> None:
    told = " ".join(call("optimize", "--help").split())
    assert f"auto, or one of {', '.join(POLICIES)}." in told
    assert "..." not in call("--help").partition("Commands:")[2]


def test_inputs_with_a_meaning_are_given_in_files(
    folder: Path, call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """(float[1,2,4] x, float[1] size) => (float[1,2,h] y) {
        wide = Cast<to = 7>(size)
        sizes = Concat<axis = 0>(first, wide)
        y = Resize(x, none, none, sizes)
    }"""
    model = parsed(text, first=np.array([1, 2]))
    model.graph.node[2].input[1] = model.graph.node[2].input[2] = ""
    saved(model, folder, "resize.onnx")
    np.save("size.npy", np.array([8], np.float32))
    given = ("--input", "size=size.npy")
    made = ("optimize", "resize.onnx", "-o", "new.onnx", "--device", "cpu", "--no-cache")
    call(*made, *given)
    asked: list[tuple[str, ...]] = [
        ("verify", "new.onnx", "resize.onnx", "--device", "cpu"),
        ("bench", "new.onnx", *QUICK),
        ("bench", "new.onnx", "--throughput", "--duration", "0.01"),
        ("run", "new.onnx"),
    ]
    for command in asked:
        call(*command, *given)
    assert call("run", "new.onnx", *given).startswith("y  float32[1, 2, 8]")
    for command in [made, *asked]:
        assert run(list(command)) == 1
        sentence = capsys.readouterr().err
        assert sentence.startswith("onnxsched: The model fails on random inputs (ONNX Runtime")
        assert sentence.endswith("); give real ones with --input NAME=FILE.npy.\n")
