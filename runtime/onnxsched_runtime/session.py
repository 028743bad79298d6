"""ONNX Runtime: the only module that imports it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from onnx import TensorProto

# Read when it is imported: it counts its users, and warns on stderr where HOME can't be written.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from onnxsched_runtime import cuda
from onnxsched_runtime.calling import called
from onnxsched_runtime.errors import DeviceError, ModelError, RunError, UsageError
from onnxsched_runtime.settings import BufferView, SessionSettings, cuda_options
from onnxsched_runtime.source import ModelPart
from onnxsched_runtime.tensor import TensorType

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?|/\S+:\d+ [^)]*\) "
    r"|ONNX Runtime only \*guarantees\*.*(?=Current official)|\[with [^\]]*\] |\s*; GPU=\d+ ;.*"
)
_UNPORTABLE_FUSIONS = ["BiasSoftmaxFusion", "ConvAddActivationFusion"]
"""Fusions whose result only the CUDA provider runs: made in a session, never in a file."""

_BIAS_FUSION = "MatMulAddFusion"
"""Makes a Gemm of MatMul and bias. Left alone, later fusions take the bias in for nothing."""
_COPY_REMOVAL = "CommonSubexpressionElimination"
"""Would make one of operators that are computed on several devices."""


class OrtSession:
    """One `onnxruntime.InferenceSession`, run by values or bound to fixed buffers.

    On a GPU it always launches on one stream that is given to it: left to itself ORT uses several,
    and once a process has used more than eight, every kernel of its graphs starts later (see
    `docs/adr/0013-few-streams.md`).
    """

    def __init__(self, source: ModelPart | Path, settings: SessionSettings) -> None:
        """Create the session.

        Raises:
            DeviceError: The CUDA provider does not load.
            ModelError: ORT refuses the model.
        """
        options = _session_options(settings)
        if isinstance(source, ModelPart):
            _add_weights(options, source)
        self._weights = source.weights if isinstance(source, ModelPart) else None
        self._is_fresh = settings.device.kind == "cuda"
        self._device = settings.device
        self._streams = ExitStack()
        try:
            self._session = _create(source, options, settings, self._streams)
        except BaseException:
            self._streams.close()
            raise
        self._run_options = onnxruntime.RunOptions()
        if settings.stream_handle is not None:
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(
        self, inputs: Mapping[str, BufferView], outputs: Mapping[str, BufferView]
    ) -> BoundRun:
        """Fix the buffers of every input and output; the caller keeps them alive.

        Returns:
            What runs the session on these buffers; it may be bound to others as well.
        """
        binding = self._session.io_binding()
        for bind, views in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, view in views.items():
                kind, index = view.device.kind, view.device.index
                bind(name, kind, index, view.element_type, view.shape, view.pointer)
        return BoundRun(self, binding)

    def run_bound(self, binding: Any) -> None:
        """Run on bound buffers; with a stream of ours, only launch.

        Raises:
            RunError: An operator failed.
        """
        try:
            called(self._device, self._session.run_with_iobinding, binding, self._run_options)
        except Exception as error:
            raise RunError(f"ONNX Runtime failed: {_first_line(error)}.") from error
        self._has_run()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run on host values and wait for the results.

        Raises:
            RunError: An operator failed.
        """
        try:
            results = list(called(self._device, self._session.run, outputs, dict(feeds)))
        except Exception as error:
            raise RunError(f"ONNX Runtime failed: {_first_line(error)}.") from error
        self._has_run()
        return results

    def _has_run(self) -> None:
        if self._is_fresh:
            self._is_fresh = False
            cuda.release_blas_variable()

    def output_types(self) -> dict[str, TensorType]:
        """What ORT infers of every output that is a tensor."""
        types = {}
        for value in self._session.get_outputs():
            if match := re.fullmatch(r"tensor\((\w+)\)", value.type):
                static = all(isinstance(size, int) for size in value.shape)
                shape = tuple(value.shape) if static else None
                types[value.name] = TensorType(TensorProto.DataType.Value(match[1].upper()), shape)
        return types

    def close(self) -> None:
        """Free the session, then its stream and weights.

        All that it has launched is awaited first: after a run, ORT hands pinned memory back from a
        callback on the stream, and where that holds the last reference it frees the memory there,
        which CUDA forbids, and ends the process.
        """
        try:
            if self._device.kind == "cuda" and not self._is_fresh:
                cuda.synchronize(self._device)
        finally:
            self._free()

    def _free(self) -> None:
        try:
            called(self._device, self._release)
        except RuntimeError:  # the interpreter ends, and has ended the device's thread
            self._release()
        self._streams.close()
        self._weights = None

    def _release(self) -> None:
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class BoundRun:
    """A session and the buffers that one of its runs reads and writes."""

    session: OrtSession
    binding: Any

    def launch(self) -> None:
        """Run; with a stream of ours, only launch.

        Raises:
            RunError: An operator failed.
        """
        self.session.run_bound(self.binding)


def lower_to_file(source: ModelPart, target: Path, settings: SessionSettings) -> None:
    """Let ORT make every optimization for a GPU and a variant, and save the result.

    But for the one that makes a Gemm of a MatMul and an Add: it has as many kernels, and the
    Reshapes that it adds are copies where a stream ends. And operators that compute the same stay
    apart: those that nobody wanted twice are gone since `optimize_file`.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    options = _session_options(settings)
    _save_optimized(options, target)
    _add_weights(options, source)
    with _created(source, options, settings, [_BIAS_FUSION, _COPY_REMOVAL]):
        pass


def optimize_file(source: Path, target: Path, settings: SessionSettings) -> dict[str, str]:
    """Let ORT fold constants and fuse operators, and save the result.

    The level is ORT's extended one: the next would bind the file to this machine's processor.

    Returns:
        The nodes that need the CPU provider, with their operator types.

    Raises:
        DeviceError: The CUDA provider does not load.
        ModelError: ORT refuses the model.
    """
    options = _session_options(settings)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    _save_optimized(options, target)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with _created(source, options, settings, [*_UNPORTABLE_FUSIONS, _BIAS_FUSION]) as held:
        return {
            node.name: node.op_type
            for part in held[0].get_provider_graph_assignment_info()
            if part.ep_name == _CPU and settings.device.kind != "cpu"
            for node in part.get_nodes()
        }


def to_float16(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """The model with float32 made float16 inside; inputs and outputs keep their types.

    By ONNX Runtime's own converter, which leaves operators alone that have no float16 kernel.

    Args:
        model: Left as it is.
        kept: Further types of operators to leave in float32.
    """
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():  # of weights below the smallest float16, which become that
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = convert_float_to_float16(
            copy,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kept],
        )
    _drop_repeated(converted.graph)
    return converted


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Remove what the converter writes twice, in place: Casts of what one operator reads twice."""
    written: set[str] = set()
    kept = []
    for node in graph.node:
        if not written.issuperset(node.output):
            kept.append(node)
        written.update(node.output)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def library_versions() -> dict[str, str]:
    """Versions of ONNX Runtime and how it was built."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_build": onnxruntime.get_build_info(),
        "onnx": importlib.metadata.version("onnx"),
        "numpy": np.__version__,
    }


def is_cuda_built() -> bool:
    """Whether this ORT was built with the CUDA provider; says nothing of whether it loads."""
    return _CUDA in onnxruntime.get_available_providers()


@functools.cache
def load_cuda_libraries() -> None:
    """Load what the CUDA provider links to: from the wheels beside ORT, else as torch finds it."""
    cuda.keep_blas_workspace()
    onnxruntime.set_default_logger_severity(3)
    if not (Path(onnxruntime.__file__).parent.parent / "nvidia").is_dir():
        cuda.load_torch()
    onnxruntime.preload_dlls()


def missing_cuda_library() -> str | None:
    """Why the CUDA provider's library does not load here; None where it does."""
    stem = "onnxruntime_providers_cuda"
    name = f"{stem}.dll" if os.name == "nt" else f"lib{stem}.so"
    cuda.device_count()
    load_cuda_libraries()
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / name))
    except OSError as error:
        return str(error)
    return None


def _add_weights(options: Any, part: ModelPart) -> None:
    """Give a session the weights that lie beside a model's bytes."""
    if part.weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(w) for w in part.weights.values()]
        options.add_external_initializers(list(part.weights), values)


def _save_optimized(options: Any, target: Path) -> None:
    options.optimized_model_filepath = str(target)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")


def _session_options(settings: SessionSettings) -> Any:
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
                f"The custom operator library '{library}' does not load ({_first_line(error)})."
            ) from error
    return options


@contextmanager
def _created(
    source: ModelPart | Path, options: Any, settings: SessionSettings, disabled: Sequence[str]
) -> Iterator[list[Any]]:
    """A session of ORT's for a moment, in a list: it is freed in the thread that made it."""
    with ExitStack() as streams:
        held = [_create(source, options, settings, streams, disabled)]
        try:
            yield held
        finally:
            called(settings.device, held.clear)


def _create(
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
        raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}.") from error
    if settings.device.kind == "cuda" and _CUDA not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime's CUDA provider does not load for {settings.device}; "
            "`onnxsched doctor` says what is missing."
        )
    return session


def _providers(settings: SessionSettings) -> list[Any]:
    if settings.device.kind == "cpu":
        return [_CPU]
    cuda.require_device(settings.device)
    load_cuda_libraries()
    return [(_CUDA, cuda_options(settings)), *([_CPU] if settings.host_operators else [])]


def _first_line(error: BaseException) -> str:
    """What ORT complains of, without its codes, our scratch files and its source lines."""
    text = str(error).strip() or repr(error)
    return _NOISE.sub("", text.splitlines()[0]).rstrip(".")
