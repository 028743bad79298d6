"""What a session is made with, and what it is bound to."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsched_runtime.device import Device
from onnxsched_runtime.tensor import TensorType
from onnxsched_runtime.variant import DEFAULT_VARIANT, Variant


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session is made."""

    device: Device
    stream_handle: int | None = None
    """The CUDA stream that everything is launched on; where None, the session has its own."""
    graph_capture: bool = False
    """Let ORT capture and replay its own CUDA graph."""
    host_operators: bool = False
    """Allow operators that only the CPU provider has."""
    thread_count: int = 0
    """Worker threads within an operator on the CPU; 0 is ORT's choice."""
    custom_ops: tuple[str, ...] = ()
    """Shared libraries with custom operators."""
    variant: Variant = DEFAULT_VARIANT
    """How the CUDA provider executes it."""
    keeps_nodes: bool = False
    """Run the nodes as they are and in their order, without any optimization."""


@dataclass(frozen=True, slots=True)
class BufferView:
    """Memory that a session reads from or writes to."""

    pointer: int
    device: Device
    element_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return TensorType(self.element_type, self.shape).nbytes


def cuda_options(settings: SessionSettings) -> dict[str, str]:
    """The settings as options of ONNX Runtime's CUDA provider."""
    options = {
        "device_id": str(settings.device.index),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(settings.graph_capture)),
        "prefer_nhwc": str(int(settings.variant.layout == "nhwc")),
        "fuse_conv_bias": str(int(settings.variant.fuse_conv_bias)),
        "cudnn_conv_algo_search": settings.variant.conv_search.upper(),
        "use_tf32": str(int(settings.variant.tf32)),
    }
    if settings.stream_handle is not None:
        options["user_compute_stream"] = str(settings.stream_handle)
    return options
