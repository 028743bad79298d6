"""Is this machine ready? What is there, and what is missing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from onnxsched.environment import describe_environment
from onnxsched.profiling.roofline import roofline_model
from onnxsched_runtime import cuda, session
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.session import OrtSession
from onnxsched_runtime.settings import SessionSettings
from onnxsched_runtime.source import ModelSource


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    environment: dict[str, Any]
    devices: tuple[dict[str, Any], ...]
    """Every GPU with its properties."""
    cuda_provider: str
    """`loads`, or why it does not."""
    peer_access: dict[str, bool]
    """For each ordered pair of GPUs whether one reaches the other's memory."""

    @property
    def is_gpu_ready(self) -> bool:
        """Whether models can be scheduled on a GPU here."""
        return self.cuda_provider == "loads"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "schema_version": 1,
            "is_gpu_ready": self.is_gpu_ready,
            "cuda_provider": self.cuda_provider,
            "devices": list(self.devices),
            "peer_access": self.peer_access,
            "environment": self.environment,
        }


def diagnose() -> Diagnosis:
    """Look at GPU, driver, libraries and ORT build, and load the CUDA provider for real."""
    gpus = [Device("cuda", index) for index in range(cuda.device_count())]
    environment = describe_environment(gpus[0] if gpus else Device("cpu"))
    return Diagnosis(
        environment=environment | cuda.library_versions(),
        devices=tuple({"id": str(gpu), **cuda.device_properties(gpu)} for gpu in gpus),
        cuda_provider=_try_provider(gpus),
        peer_access={
            f"{source}->{target}": cuda.has_peer_access(source, target)
            for source, target in itertools.permutations(gpus, 2)
        },
    )


def _try_provider(gpus: list[Device]) -> str:
    """Whether a session on the first GPU comes up: what ORT lists says nothing of that."""
    if not session.is_cuda_built():
        return "this onnxruntime is built without CUDA; install onnxruntime-gpu"
    if not gpus:
        return "no CUDA device is visible; install a driver and a torch built for CUDA"
    model = roofline_model(Device("cpu"))
    try:
        part = ModelSource(model.proto, model.tensors).whole()
        with OrtSession(part, SessionSettings(gpus[0])):
            return "loads"
    except OnnxschedError as error:
        return session.missing_cuda_library() or str(error)
