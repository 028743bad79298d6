"""Make a session of ONNX Runtime's as settings say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxsched_runtime import cuda
from onnxsched_runtime.calling import called
from onnxsched_runtime.errors import DeviceError, ModelError, UsageError
from onnxsched_runtime.session.binding import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    complaint,
    load_cuda_libraries,
    onnxruntime,
)
from onnxsched_runtime.settings import SessionSettings, cuda_options
from onnxsched_runtime.source import ModelPart


def session_options(settings: SessionSettings) -> Any:
    """What `onnxruntime.SessionOptions` hold of the settings.

    Raises:
        UsageError: A library of custom operators does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and said once
    if settings.keeps_nodes:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.intra_op_num_threads = settings.thread_count
    options.inter_op_num_threads = 1
    if settings.thread_count:  # sessions side by side must not spin away each other's cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if settings.device.kind == "cuda":
        options.intra_op_num_threads = settings.thread_count or 1
        if not settings.host_operators:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for library in settings.custom_ops:
        try:
            # a bare name is looked for in the folders of libraries only, never in this one
            found = os.path.abspath(library) if os.path.isfile(library) else os.fspath(library)
            options.register_custom_ops_library(found)
        except Exception as error:
            raise UsageError(
                f"The custom operator library '{library}' does not load ({complaint(error)}); "
                "give one that was built for this machine and this ONNX Runtime."
            ) from error
    return options


def add_weights(options: Any, part: ModelPart) -> None:
    """Give a session the weights that lie beside a model's bytes."""
    if part.weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(w) for w in part.weights.values()]
        options.add_external_initializers(list(part.weights), values)


@contextmanager
def created(
    source: ModelPart | Path, options: Any, settings: SessionSettings, disabled: Sequence[str]
) -> Iterator[list[Any]]:
    """A session of ORT's for a moment, in a list: it is freed in the thread that made it."""
    with ExitStack() as streams:
        held = [create(source, options, settings, streams, disabled)]
        try:
            yield held
        finally:
            called(settings.device, held.clear)


def create(
    source: ModelPart | Path,
    options: Any,
    settings: SessionSettings,
    streams: ExitStack,
    disabled_optimizers: Sequence[str] = (),
) -> Any:
    """A session of ORT's; on a GPU, one without a stream gets one that `streams` closes."""
    model = source.content if isinstance(source, ModelPart) else str(source)
    if settings.device.kind == "cuda" and settings.stream_handle is None:
        own = streams.enter_context(cuda.graph_stream(settings.device))
        settings = replace(settings, stream_handle=own.handle)
    providers = _providers(settings)
    try:
        session = called(
            settings.device,
            onnxruntime.InferenceSession,
            model,
            options,
            providers=providers,
            disabled_optimizers=list(disabled_optimizers),
            enable_fallback=0,
        )
    except Exception as error:
        raise ModelError(f"ONNX Runtime refuses the model: {complaint(error)}.") from error
    if settings.device.kind == "cuda" and CUDA_PROVIDER not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime's CUDA provider does not load for {settings.device}; "
            "`onnxsched doctor` says what is missing."
        )
    return session


def _providers(settings: SessionSettings) -> list[Any]:
    if settings.device.kind == "cpu":
        return [CPU_PROVIDER]
    cuda.require_device(settings.device)
    load_cuda_libraries()
    on_host = [CPU_PROVIDER] if settings.host_operators else []
    return [(CUDA_PROVIDER, cuda_options(settings)), *on_host]
