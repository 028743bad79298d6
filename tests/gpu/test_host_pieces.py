"""What can't be captured runs on the host, between CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxsched
from onnxsched.annotate import annotation_for
from onnxsched.checking import check_numerics, run_plain
from onnxsched.loading import graph_from_model, load_model
from onnxsched.schedule import Schedule, Slot
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.executors.streams import StreamExecutor
from onnxsched_runtime.load import Session
from support import models


def _mixed() -> onnx.ModelProto:
    """Convolutions, then an If, a loop-like cut by NonZero, then convolutions again."""
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 17]>
        mixed (float[1, 4, 16, 16] x, bool flag) => (float[1, 4, 16, 16] y, int64[4, n] where) {
            a = Relu (x)
            b = Sigmoid (x)
            c = Add (a, b)
            d = If (flag) <
                then_branch = yes () => (float[1, 4, 16, 16] t) { t = Mul (c, c) },
                else_branch = no () => (float[1, 4, 16, 16] e) { e = Neg (c) }
            >
            f = Tanh (d)
            g = Relu (d)
            y = Add (f, g)
            where = NonZero (g)
        }
    """)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> onnxsched.OptimizeResult:
    folder = tmp_path_factory.mktemp("mixed")
    onnx.save(_mixed(), folder / "in.onnx")
    return onnxsched.optimize(
        folder / "in.onnx", folder / "out.onnx", device="cuda:0", cache_dir=None, budget_s=4.0
    )


def test_a_model_with_control_flow_runs_in_pieces_and_says_why(
    mixed: onnxsched.OptimizeResult,
) -> None:
    result = mixed
    assert any("If" in reason for reason in result.host_reasons.values())
    assert all(difference.is_within for difference in result.differences)
    with onnxsched.load(result.path) as session:
        assert isinstance(session.executor, StreamExecutor)
        kinds = [piece.captured for piece in session.plan.pieces]
        assert True in kinds
        assert False in kinds
        generator = np.random.default_rng(0)
        for flag in (True, False, True):
            x = generator.standard_normal((1, 4, 16, 16)).astype(np.float32)
            y, where = session.run(None, {"x": x, "flag": np.array(flag)})
            c = np.maximum(x, 0) + 1 / (1 + np.exp(-x))
            d = c * c if flag else -c
            np.testing.assert_allclose(y, np.tanh(d) + np.maximum(d, 0), rtol=1e-5, atol=1e-6)
            assert where.shape == (4, int((d > 0).sum()))


def test_gpu_tensors_pass_through_host_pieces(mixed: onnxsched.OptimizeResult) -> None:
    import torch

    x = np.random.default_rng(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    with onnxsched.load(mixed.path) as session:
        expected = session.run(None, {"x": x, "flag": np.array(True)})
        outputs = session(torch.from_numpy(x).cuda(), torch.tensor(True, device="cuda"))
        for output, other in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output.cpu().numpy(), other)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_small_model_computes_what_plain_ort_does(name: str, tmp_path: Path) -> None:
    """Splits, sequences, loops, optional inputs: dealt over three streams, whatever that costs."""
    device = Device("cuda")
    onnx.save(models.MODELS[name](), tmp_path / "in.onnx")
    model = load_model(tmp_path / "in.onnx", device)
    graph = graph_from_model(model)
    schedule = Schedule(tuple(Slot(i, Placement(device, i % 3)) for i in range(len(graph))))
    with Session(model.proto, annotation_for(model, schedule)) as session:
        assert session.refusal is None
        assert check_numerics(model, session, run_plain(model, device, 0, ()))


def _wide(count: int, body: str) -> onnx.ModelProto:
    """So many small inputs of a Concat, and one of another size."""
    inputs = ", ".join(f"t{i}" for i in range(count))
    parts = " ".join(f"t{i} = Mul (x, c{i})" for i in range(count))
    weights = ", ".join(f"float[1] c{i} = {{{i}.0}}" for i in range(count))
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 17]>
        wide (float[1, 8] x, float[1, 16] z) => (float[1, {8 * count + 16}] y)
        <{weights}> {{ {parts} {body.format(inputs=f"{inputs}, z")} }}
    """)


def test_an_operator_that_can_not_be_captured_stays_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ORT refuses to capture a Concat of more than 32 unequal inputs, and may end the process."""
    body = "joined = Concat <axis = 1> ({inputs}) y = Relu (joined)"
    onnx.save(_wide(32, body), tmp_path / "in.onnx")
    monkeypatch.setattr("onnxsched.loading._narrow_concats", lambda model: None)
    result = onnxsched.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", device="cuda:0", cache_dir=None, budget_s=4.0
    )
    assert [("Concat" in name, "captur" in why) for name, why in result.host_reasons.items()] == [
        (True, True)
    ], result.host_reasons
    assert all(difference.is_identical for difference in result.differences)


_CLOSING = """
import sys
import numpy as np
import onnxsched_runtime.session as runtime
from onnxsched_runtime.device import Device
from onnxsched_runtime.settings import SessionSettings
settings = SessionSettings(Device("cuda", 0), host_operators=True)
feeds = {"x": np.zeros((1, 8), np.float32), "z": np.zeros((1, 16), np.float32)}
for _ in range(100):
    with runtime.OrtSession(sys.argv[1], settings) as session:
        session.run(feeds)
"""


def test_a_plain_session_is_closed_right_after_a_run_that_hands_memory_back(
    tmp_path: Path,
) -> None:
    """In a process of its own, which the failure ends."""
    onnx.save(_wide(40, "y = Concat <axis = 1> ({inputs})"), tmp_path / "in.onnx")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _CLOSING, str(tmp_path / "in.onnx")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 0, ended.stderr[-500:]


def test_a_device_that_is_not_there_is_one_sentence_and_exit_code_4(tmp_path: Path) -> None:
    onnx.save(_mixed(), tmp_path / "in.onnx")
    with pytest.raises(OnnxschedError, match="cuda:7 is not available") as caught:
        onnxsched.optimize(
            tmp_path / "in.onnx", tmp_path / "out.onnx", device="cuda:7", budget_s=4.0
        )
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out.onnx").exists()
