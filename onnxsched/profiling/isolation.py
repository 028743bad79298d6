"""Measure GPU operators in a process of their own.

Some of ORT's kernels end the process when a stream that they are launched on is being captured.
That must cost a model one operator, which then stays on the host, and not the user the run. The
worker says which operator it is about to capture; if it dies there, a new one takes the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxsched.loading import Model
from onnxsched.profile import OperatorProfile
from onnxsched.profiling.gpu import measure_on_gpu
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError, OnnxschedError, UsageError
from onnxsched_runtime.model import read_model, write_model
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import Variant

_ERRORS: Mapping[str, type[OnnxschedError]] = {
    kind.__name__: kind for kind in (DeviceError, ModelError, OnnxschedError, UsageError)
}


def measure_isolated(
    model: Model, device: Device, nodes: Sequence[onnx.NodeProto], custom_ops: tuple[str, ...]
) -> Iterator[tuple[str, OperatorProfile]]:
    """As `measure_on_gpu`, but an operator that ends the process only yields a refusal.

    Raises:
        ModelError: ORT refuses an operator on its own, or ends before any is captured.
    """
    op_types = {node.name: node.op_type for node in nodes}
    waiting = list(op_types)
    with tempfile.TemporaryDirectory(prefix="onnxsched-") as scratch:
        path = Path(scratch, "model.onnx")
        write_model(model.proto, path)
        while waiting:
            announced = None
            for message in _messages(path, device, waiting, custom_ops, model):
                if "error" in message:
                    raise _ERRORS.get(message["kind"], OnnxschedError)(message["error"])
                name = announced = message["name"]
                if "profile" in message:
                    announced = None
                    waiting.remove(name)
                    yield name, OperatorProfile.from_json(message["profile"])
            if waiting and announced is None:
                raise ModelError(
                    f"ONNX Runtime ended while '{waiting[0]}' and others were run alone; the "
                    "model may not run on this GPU at all."
                )
            if announced is not None:
                waiting.remove(announced)
                reason = f"ONNX Runtime ends the process when {op_types[announced]} is captured"
                yield announced, OperatorProfile((), (), reason)


def _messages(
    path: Path,
    device: Device,
    names: Sequence[str],
    custom_ops: tuple[str, ...],
    model: Model,
) -> Iterator[dict[str, Any]]:
    """What a worker says, one JSON object a line, until it ends in whatever way."""
    request = {
        "path": str(path),
        "device": str(device),
        "names": names,
        "libraries": custom_ops,
        "tensors": {name: [t.element_type, t.shape] for name, t in model.tensors.items()},
        "variant": model.variant.to_json(),
        "is_lowered": model.is_lowered,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the caller sees
                worker.stdin.write(json.dumps(request))
                worker.stdin.close()
            for line in worker.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            if worker.wait() == -signal.SIGKILL:
                yield {"error": "The profiling worker was killed; memory may have run out.",
                       "kind": "OnnxschedError"}  # fmt: skip
        finally:
            worker.kill()


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _work() -> None:
    """The worker: read the request, measure, and say what comes out."""
    request = json.load(sys.stdin)
    try:
        proto = read_model(request["path"])
        tensors = {
            name: TensorType(element, None if shape is None else tuple(shape))
            for name, (element, shape) in request["tensors"].items()
        }
        variant = Variant.from_json(request["variant"])
        model = Model(proto, tensors, {}, {}, proto, variant, request["is_lowered"])
        by_name = {node.name: node for node in proto.graph.node}
        profiles = measure_on_gpu(
            model,
            Device.parse(request["device"]),
            [by_name[name] for name in request["names"]],
            tuple(request["libraries"]),
            announce=lambda name: _say(name=name),
        )
        for name, profile in profiles:
            _say(name=name, profile=dataclasses.asdict(profile))
    except OnnxschedError as error:
        _say(error=str(error), kind=type(error).__name__)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        _say(error=f"Profiling failed ({type(error).__name__}: {text}).", kind="OnnxschedError")


if __name__ == "__main__":
    _work()
