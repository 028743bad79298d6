"""Device time of copies from one GPU to another."""

from __future__ import annotations

from onnx import TensorProto

from onnxsched_runtime.cuda.buffers import Buffer, DeviceMemory
from onnxsched_runtime.cuda.devices import enable_peer_access
from onnxsched_runtime.cuda.streams import Stream, time_launches_us
from onnxsched_runtime.device import Device
from onnxsched_runtime.tensor import TensorType


def time_copies_us(source: Device, target: Device, nbytes: int, count: int) -> tuple[float, ...]:
    """Device time of copies as plans make them, between events, one sample a copy.

    The stream is the target's. Without peer access the driver goes through the host.

    Raises:
        OnnxschedError: A device has no room for `nbytes`.
    """
    enable_peer_access((source, target))
    kind = TensorType(TensorProto.UINT8, (nbytes,))
    with (
        DeviceMemory(nbytes, source) as there,
        DeviceMemory(nbytes, target) as here,
        Stream(target) as stream,
    ):
        origin = Buffer(kind, source, there.pointer)
        copy = Buffer(kind, target, here.pointer)
        return time_launches_us(stream, lambda: copy.fill_from(origin, stream), count)
