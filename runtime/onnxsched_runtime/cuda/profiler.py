"""Which kernels ran: torch's profiler, which sees what ORT launches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxsched_runtime.cuda.binding import torch_module
from onnxsched_runtime.cuda.devices import synchronize
from onnxsched_runtime.device import Device


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name what is launched inside, for `kernel_trace`."""
    with torch_module().profiler.record_function(name):
        yield


def kernel_trace(work: Callable[[], None], device: Device) -> dict[str, Any]:
    """Run `work`, all on one GPU, under torch's profiler (CUPTI) and return its Chrome trace."""
    torch = torch_module()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(path))
        return dict(json.loads(path.read_bytes()))
