"""From an annotated file to a session: the composition root of the runtime."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, Self, get_args

import numpy as np
import onnx

from onnxsched_runtime import cuda
from onnxsched_runtime.annotation import Annotation, read_annotation
from onnxsched_runtime.arguments import NodeArg, arguments_of, host_array
from onnxsched_runtime.device import Device, Placement
from onnxsched_runtime.errors import UsageError
from onnxsched_runtime.execution import Executor, lowered_source, open_executor, plan_lowered
from onnxsched_runtime.executors.ranks import Membership, RankExecutor, joined, member
from onnxsched_runtime.executors.streams import Capture, StreamExecutor
from onnxsched_runtime.files import read_model
from onnxsched_runtime.group import require_timeout
from onnxsched_runtime.model import input_values
from onnxsched_runtime.plan import ExecutionPlan
from onnxsched_runtime.source import ModelSource

_UNFUSED = "cuDNN has no kernel here for a fused convolution; sessions run all"


def load(
    path: str | os.PathLike[str],
    *,
    device_map: Mapping[str, str] | None = None,
    capture: Capture = "whole",
    custom_ops: Sequence[str] = (),
    process_group: Any = None,
    device_ranks: Mapping[str, int] | None = None,
    timeout_s: float = 20.0,
) -> Session:
    """Load an annotated model and make it ready to run.

    With a process group, all of its processes load the model and then run it equally often. Rank
    0 gives the inputs and gets the outputs; on others the session has none (docs/distributed.md).

    Args:
        path: A model written by `onnxsched optimize`.
        device_map: Moves the schedule to other devices, e.g. `{"cuda:0": "cuda:1"}`; a schedule
            for a GPU runs on `cpu:0` too.
        capture: `whole` for one CUDA graph, `ort` for one graph a segment by ONNX Runtime
            itself, `none` to launch at every run. What the model does not allow falls back to
            the next, and `Session.refusal` says why.
        custom_ops: Shared libraries with custom operators.
        process_group: Of torch.distributed; all of its processes run the schedule together.
        device_ranks: The rank that owns each device; if None, they are divided evenly, in order.
        timeout_s: How long another process may be silent, or take for one step.

    Raises:
        UsageError: There is no such file, or a device or a way to capture is misspelt.
        ModelError: It is no ONNX model, or carries no schedule that fits it.
        DeviceError: A device of the schedule is not on this machine.
        RankError: Another process differs, died, hangs or failed.
    """
    if capture not in get_args(Capture):
        raise UsageError(f"There is no capture '{capture}'; there are whole, ort, none.")
    if process_group is not None:
        require_timeout("timeout_s", timeout_s)
    group = nullcontext() if process_group is None else joined(process_group, timeout_s)
    with cuda.blas_variable_only_if_needed(), group as peers:
        model = read_model(path)
        annotation = moved(read_annotation(model), device_map or {})
        membership = None if peers is None else member(annotation.devices, peers, device_ranks)
        session = Session(
            model, annotation, capture=capture, custom_ops=tuple(custom_ops), membership=membership
        )
    own = session.plan.devices if membership is None else [membership.device]
    with cuda.other_contexts(own):
        cuda.forget_idle_streams()
    return session


def moved(annotation: Annotation, device_map: Mapping[str, str]) -> Annotation:
    """The annotation with devices renamed.

    Raises:
        UsageError: A device is misspelt, or is not in the schedule.
    """
    renamed = {Device.parse(old): Device.parse(new) for old, new in device_map.items()}
    if strangers := renamed.keys() - set(annotation.devices):
        used = ", ".join(map(str, annotation.devices))
        raise UsageError(f"The schedule does not use {min(strangers)}; it uses {used}.")
    placements = {
        name: Placement(renamed.get(placement.device, placement.device), placement.stream)
        for name, placement in annotation.placements.items()
    }
    return replace(annotation, placements=placements)


class Session:
    """A scheduled model, used like `onnxruntime.InferenceSession`.

    What nobody holds any more is closed, unless it is one of several processes, which must leave
    together.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        annotation: Annotation,
        *,
        capture: Capture = "whole",
        custom_ops: tuple[str, ...] = (),
        lowered: ModelSource | None = None,
        membership: Membership | None = None,
    ) -> None:
        """Lower, plan, create the ORT sessions and capture; see `load`.

        Args:
            model: The portable model.
            annotation: Its schedule.
            capture: See `load`.
            custom_ops: See `load`.
            lowered: The model lowered before, by the same variant on the same device.
            membership: How this process takes part, if there are several.
        """
        self.annotation = annotation
        self.device = annotation.devices[0]
        if {device.kind for device in annotation.devices} != {self.device.kind}:
            used = ", ".join(map(str, annotation.devices))
            raise UsageError(f"The schedule uses {used}; GPUs and the CPU can't share a model.")
        self._inputs = arguments_of(input_values(model), annotation)
        self._outputs = arguments_of(model.graph.output, annotation)
        if membership is not None and membership.peers.rank > 0:
            self._inputs, self._outputs = [], []
        self._input_names = {argument.name for argument in self._inputs}
        self._output_names = [argument.name for argument in self._outputs]
        self._unfused: str | None = None
        self.plan: ExecutionPlan
        self._executor: Executor
        device = None if membership is None else membership.device
        source = lowered or lowered_source(model, annotation, custom_ops, device)
        if source.variant != annotation.variant:
            self._unfused = _UNFUSED
        self.plan = plan_lowered(model, annotation, source)
        if membership is None:
            self._executor = open_executor(
                source, self.plan, capture=capture, custom_ops=custom_ops
            )
        else:
            self._executor = RankExecutor(
                source, self.plan, model, membership, custom_ops, capture
            )
        self._one_at_a_time = threading.RLock()
        self._is_running = self._is_closed = False
        self._dropped = None
        if membership is None:
            self._dropped = weakref.finalize(self, _close_quietly, self._executor)
            self._dropped.atexit = False  # the process gives back all that it has
        self._host_inputs = [
            argument
            for argument in self._inputs
            if isinstance(self._executor, StreamExecutor)
            and self._executor.reads_on_host(argument.name)
        ]

    @property
    def capture(self) -> str:
        """How it is captured: `whole`, `ort` or `none`."""
        return str(self._executor.capture)

    @property
    def refusal(self) -> str | None:
        """Why it is not executed or captured as was asked for; None where it is."""
        return self._unfused or self._executor.refusal

    @property
    def executor(self) -> Executor:
        """What runs the plan; benchmarks launch it directly."""
        return self._executor

    def get_inputs(self) -> list[NodeArg]:
        """The inputs, as ONNX Runtime shows them."""
        return list(self._inputs)

    def get_outputs(self) -> list[NodeArg]:
        """The outputs, as ONNX Runtime shows them."""
        return list(self._outputs)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: None = None,
    ) -> list[Any]:
        """Run once; calls from several threads take turns.

        Args:
            output_names: Which outputs to return, in this order; None for all.
            input_feed: A value for every input, of its exact shape. If all are GPU tensors
                (torch, or anything with DLPack), outputs are torch tensors on the GPU, ready on
                torch's current stream; else outputs are numpy arrays.
            run_options: None, as nothing else can be obeyed.

        Raises:
            UsageError: An input is missing, unknown, or of another shape or type; there are
                options; the session is closed; or a signal handler runs it within a run.
            RankError: Another process died, hangs or failed.
        """
        if run_options is not None:
            raise UsageError("A schedule has no options for a single run; leave run_options out.")
        names = self._output_names
        if isinstance(output_names, str):
            raise UsageError(f"Give the names of outputs in a list: ['{output_names}'].")
        wanted = list(output_names) if output_names is not None else []
        if unknown := [name for name in wanted if name not in names]:
            raise UsageError(f"There is no output '{unknown[0]}'; there are {names}.")
        wanted = wanted or names
        if input_feed.keys() != self._input_names:
            self._refuse_names(input_feed)
        on_device = False
        if not all(argument.fits(input_feed[argument.name]) for argument in self._inputs):
            on_device = self._on_device(input_feed.values())
            if not on_device:  # else the executor checks, once it has made tensors of them
                input_feed = {a.name: host_array(a, input_feed[a.name]) for a in self._inputs}
        with self._one_at_a_time:
            self._require_idle()
            if self._is_closed:
                raise UsageError("The session is closed; load the model again.")
            self._is_running = True
            try:
                if on_device:
                    return self._run_on_device(input_feed, wanted)
                return self._executor.run(input_feed, wanted)
            finally:
                self._is_running = False

    def _run_on_device(self, feed: Mapping[str, Any], wanted: Sequence[str]) -> list[Any]:
        assert isinstance(self._executor, StreamExecutor)
        arrays = {a.name: host_array(a, cuda.tensor_of(feed[a.name])) for a in self._host_inputs}
        return self._executor.run_on_device({**feed, **arrays}, wanted)

    def _require_idle(self) -> None:
        if self._is_running:  # by this very thread, as others have to wait
            raise UsageError(
                "The session is in the middle of a run that a signal has interrupted; let the "
                "signal handler raise, and run or close the session after that."
            )

    def __call__(self, *inputs: Any) -> Any:
        """Run on positional inputs; returns the output, or a tuple of several."""
        if len(inputs) != len(self._inputs):
            names = [argument.name for argument in self._inputs]
            raise UsageError(f"The model takes {len(names)} inputs {names}, got {len(inputs)}.")
        feeds = {a.name: value for a, value in zip(self._inputs, inputs, strict=True)}
        outputs = self.run(None, feeds)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _on_device(self, values: Any) -> bool:
        values = list(values)
        is_able = isinstance(self._executor, StreamExecutor)
        return is_able and bool(values) and all(map(_is_on_gpu, values))

    def _refuse_names(self, feed: Mapping[str, Any]) -> None:
        names = [argument.name for argument in self._inputs]
        if missing := [name for name in names if name not in feed]:
            raise UsageError(f"Input '{missing[0]}' is missing; the model takes {names}.")
        if unknown := [name for name in feed if name not in names]:
            raise UsageError(f"There is no input '{unknown[0]}'; the model takes {names}.")

    def close(self) -> None:
        """Free sessions, graphs, streams and buffers, after a run in another thread."""
        with self._one_at_a_time:
            self._require_idle()
            if not self._is_closed:
                self._is_closed = True
                if self._dropped is not None:
                    self._dropped.detach()
                self._executor.close()

    def __reduce__(self) -> Any:
        raise UsageError("A session can't be copied or pickled; load the model again.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_quietly(executor: Executor) -> None:
    """Close what nobody holds any more; whoever dropped it can't do anything about errors."""
    with suppress(Exception):
        executor.close()


def _is_on_gpu(value: Any) -> bool:
    """Whether a value offers its memory by DLPack from a CUDA device (device type 2)."""
    if (is_cuda := getattr(value, "is_cuda", None)) is not None:  # torch's, soon answered
        return bool(is_cuda)
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return int(value.__dlpack_device__()[0]) == 2
