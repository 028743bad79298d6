"""Measure GPU operators in a process of their own.

Some of ORT's kernels end the process when a stream that they are launched on is being captured.
That must cost a model one operator, which then stays on the host, and not the user the run. The
worker says which operator it is about to capture; if it dies there, and the next one does too, one
more takes the rest. What is found so is kept, so a driver's hiccup must not look like it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import onnx

from onnxsched.loading import Model
from onnxsched.profile import OperatorProfile
from onnxsched.profiling.gpu import measure_on_gpu
from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, ModelError, OnnxschedError, UsageError
from onnxsched_runtime.files import read_model, scratch_folder, write_model
from onnxsched_runtime.kernels import kernels_from_json, kernels_to_json
from onnxsched_runtime.session import load_cuda_libraries
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import Variant

_ERRORS: Mapping[str, type[OnnxschedError]] = {
    kind.__name__: kind for kind in (DeviceError, ModelError, OnnxschedError, UsageError)
}
_ASKED = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
"""By which others end a process; no operator does."""
_DONE = "done\n"
_OUT = 99
"""The file descriptor of answers, high above those that libraries open."""


class ProfilingWorker:
    """A process that measures operators; another takes its place where it has ended.

    It is started when this is made, and loads its libraries while others work.
    """

    def __init__(self) -> None:
        self._process = self._started()

    def measure(
        self,
        model: Model,
        device: Device,
        nodes: Sequence[onnx.NodeProto],
        custom_ops: tuple[str, ...],
    ) -> Iterator[tuple[str, OperatorProfile]]:
        """As `measure_on_gpu`, but an operator that ends the process only yields a refusal.

        Raises:
            ModelError: ORT refuses an operator on its own, or ends before any is captured.
        """
        op_types = {node.name: node.op_type for node in nodes}
        waiting = list(op_types)
        suspected: str | None = None
        with scratch_folder() as scratch:
            path = scratch / "model.onnx"
            write_model(model.proto, path)
            while waiting:
                announced = None
                for message in self._messages(_request(path, device, waiting, custom_ops, model)):
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
                if announced is not None and announced != suspected:
                    suspected = announced
                elif announced is not None:
                    waiting.remove(announced)
                    reason = (
                        f"ONNX Runtime ends the process when {op_types[announced]} is captured"
                    )
                    yield announced, OperatorProfile((), (), reason)

    def _messages(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What the process says to a request, until it is done with it or ends in whatever way."""
        if self._process.poll() is not None:
            self.close()
            self._process = self._started()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the caller sees
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line == _DONE:
                return
            if line.startswith("{"):
                message = json.loads(line)
                if "error" in message:
                    self.close()  # its CUDA context may be broken
                    yield message
                    return
                yield message
        ended_by = -process.wait()
        if ended_by == signal.SIGKILL:
            yield {"error": "The profiling worker was killed; memory may have run out.",
                   "kind": "OnnxschedError"}  # fmt: skip
        elif ended_by in _ASKED:
            name = signal.Signals(ended_by).name
            yield {"error": f"The profiling worker was ended by {name}; run the command again.",
                   "kind": "OnnxschedError"}  # fmt: skip

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )

    def end(self) -> None:
        """Kill the process, from which another thread may be reading."""
        self._process.kill()

    def close(self) -> None:
        """End the process; another one starts if more is to be measured."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # of what it has not read
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _request(
    path: Path,
    device: Device,
    names: Sequence[str],
    custom_ops: tuple[str, ...],
    model: Model,
) -> dict[str, Any]:
    return {
        "path": str(path),
        "device": str(device),
        "names": names,
        "libraries": custom_ops,
        "tensors": {name: [t.element_type, t.shape] for name, t in model.tensors.items()},
        "variant": model.variant.to_json(),
        "is_lowered": model.is_lowered,
        "kernels": kernels_to_json(model.kernels),
    }


def _say(**message: Any) -> None:
    os.write(_OUT, f"{json.dumps(message)}\n".encode())


def _work() -> None:
    """The worker: answer requests, one JSON object a line, until there are no more."""
    os.dup2(os.dup(1), _OUT)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what libraries print is no answer
    if cuda.device_count():
        cuda.load_torch()
        load_cuda_libraries()
    for line in sys.stdin:
        try:
            _answer(json.loads(line))
            os.write(_OUT, _DONE.encode())
        except OnnxschedError as error:
            _say(error=str(error), kind=type(error).__name__)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            _say(error=f"Profiling failed ({type(error).__name__}: {text}).",
                 kind="OnnxschedError")  # fmt: skip


def _answer(request: Mapping[str, Any]) -> None:
    """Measure what is asked for, and say what comes out."""
    proto = read_model(request["path"])
    tensors = {
        name: TensorType(element, None if shape is None else tuple(shape))
        for name, (element, shape) in request["tensors"].items()
    }
    variant = Variant.from_json(request["variant"])
    kernels = kernels_from_json(request["kernels"])
    model = Model(proto, tensors, {}, {}, proto, variant, request["is_lowered"], kernels)
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


if __name__ == "__main__":
    _work()
