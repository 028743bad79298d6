"""CUDA: devices, streams, events, graphs, buffers, kernel traces. Nothing else touches it.

Streams, events and graphs go through the CUDA bindings that torch brings; torch itself owns the
buffers, so that tensors go in and out without a copy. Both are imported at first use.
"""

from onnxsched_runtime.cuda.buffers import Buffer, tensor_on_device
from onnxsched_runtime.cuda.devices import (
    device_count,
    device_properties,
    has_peer_access,
    library_versions,
    require_device,
    synchronize,
)
from onnxsched_runtime.cuda.profiler import kernel_trace, named_range
from onnxsched_runtime.cuda.streams import Event, Graph, Stream, time_launches_us

__all__ = [
    "Buffer",
    "Event",
    "Graph",
    "Stream",
    "device_count",
    "device_properties",
    "has_peer_access",
    "kernel_trace",
    "library_versions",
    "named_range",
    "require_device",
    "synchronize",
    "tensor_on_device",
    "time_launches_us",
]
