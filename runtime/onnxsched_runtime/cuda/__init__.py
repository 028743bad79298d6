"""CUDA: devices, streams, events, graphs, buffers, kernel traces. Nothing else touches it.

All of it goes through the CUDA bindings that torch brings; torch itself is imported only for the
caller's tensors, for large inputs and outputs, for the profiler, and for kernels that reorder
numbers.
"""

from onnxsched_runtime.cuda.binding import load_torch, make_current
from onnxsched_runtime.cuda.blas import (
    blas_variable_only_if_needed,
    keep_blas_workspace,
    release_blas_variable,
)
from onnxsched_runtime.cuda.buffers import Buffer, DeviceMemory
from onnxsched_runtime.cuda.chains import Chain
from onnxsched_runtime.cuda.devices import (
    device_count,
    device_properties,
    enable_peer_access,
    free_memory_nbytes,
    has_peer_access,
    library_versions,
    require_device,
    synchronize,
)
from onnxsched_runtime.cuda.fused_kernels import FusedKernel, fused_kernel
from onnxsched_runtime.cuda.graphs import Graph
from onnxsched_runtime.cuda.moves import cutting, reordering
from onnxsched_runtime.cuda.operations import Launch, Places
from onnxsched_runtime.cuda.plain_pools import PlainPool
from onnxsched_runtime.cuda.profiler import kernel_trace, named_range
from onnxsched_runtime.cuda.racing import fastest_kernel
from onnxsched_runtime.cuda.streams import (
    Event,
    Stream,
    graph_stream,
    one_graph_stream,
    time_launches_us,
)
from onnxsched_runtime.cuda.tensors import (
    require_fit,
    tensor_of,
    tensor_of_array,
    tensor_on_device,
)
from onnxsched_runtime.cuda.transfers import time_copies_us
from onnxsched_runtime.cuda.turns import forget_idle_streams, other_contexts

__all__ = [
    "Buffer",
    "Chain",
    "DeviceMemory",
    "Event",
    "FusedKernel",
    "Graph",
    "Launch",
    "Places",
    "PlainPool",
    "Stream",
    "blas_variable_only_if_needed",
    "cutting",
    "device_count",
    "device_properties",
    "enable_peer_access",
    "fastest_kernel",
    "forget_idle_streams",
    "free_memory_nbytes",
    "fused_kernel",
    "graph_stream",
    "has_peer_access",
    "keep_blas_workspace",
    "kernel_trace",
    "library_versions",
    "load_torch",
    "make_current",
    "named_range",
    "one_graph_stream",
    "other_contexts",
    "release_blas_variable",
    "reordering",
    "require_device",
    "require_fit",
    "synchronize",
    "tensor_of",
    "tensor_of_array",
    "tensor_on_device",
    "time_copies_us",
    "time_launches_us",
]
