"""Run a session of ONNX Runtime's, by values or bound to fixed buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from onnx import TensorProto

from onnxsched_runtime import cuda
from onnxsched_runtime.calling import called
from onnxsched_runtime.errors import RunError
from onnxsched_runtime.session.binding import complaint, onnxruntime
from onnxsched_runtime.session.creating import add_weights, create, session_options
from onnxsched_runtime.settings import BufferView, SessionSettings
from onnxsched_runtime.source import ModelPart
from onnxsched_runtime.tensor import TensorType


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
        options = session_options(settings)
        if isinstance(source, ModelPart):
            add_weights(options, source)
        self._weights = source.weights if isinstance(source, ModelPart) else None
        self._is_fresh = settings.device.kind == "cuda"
        self._device = settings.device
        self._streams = ExitStack()
        try:
            self._session = create(source, options, settings, self._streams)
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
            raise RunError(f"ONNX Runtime failed: {complaint(error)}.") from error
        self._has_run()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run on host values and wait for the results.

        Raises:
            RunError: An operator failed.
        """
        try:
            results = list(called(self._device, self._session.run, outputs, dict(feeds)))
        except Exception as error:
            raise RunError(f"ONNX Runtime failed: {complaint(error)}.") from error
        self._has_run()
        return results

    def _has_run(self) -> None:
        if self._is_fresh:
            self._is_fresh = False
            cuda.release_blas_variable()

    def output_types(self) -> dict[str, TensorType]:
        """What ORT infers of every output that is a tensor.

        Of a scalar it says what it says of a tensor whose rank it does not know: no shape.
        """
        types = {}
        for value in self._session.get_outputs():
            if match := re.fullmatch(r"tensor\((\w+)\)", value.type):
                static = value.shape and all(isinstance(size, int) for size in value.shape)
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
