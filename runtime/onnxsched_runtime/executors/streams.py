"""The CUDA executor: the plan over CUDA streams, captured into graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, Self

import numpy as np

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, OnnxschedError
from onnxsched_runtime.executors.graphs import PieceGraphs
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.executors.segments import SegmentRunner
from onnxsched_runtime.group import NcclLinks
from onnxsched_runtime.plan import ExecutionPlan, Piece
from onnxsched_runtime.source import ModelSource

Capture = Literal["whole", "ort", "none"]


class StreamExecutor:
    """Runs a plan on CUDA streams: as CUDA graphs where that works, else by issuing steps."""

    def __init__(
        self,
        source: ModelSource,
        plan: ExecutionPlan,
        capture: Capture = "whole",
        custom_ops: tuple[str, ...] = (),
        links: NcclLinks | None = None,
    ) -> None:
        """Create sessions, warm them up and capture.

        Args:
            source: The annotated model.
            plan: How it is cut and ordered.
            capture: `whole` for one CUDA graph, `ort` for one graph a session by ORT itself,
                `none` for launching at every run. What is refused falls back to the next, and
                `refusal` says why.
            custom_ops: Libraries of custom operators.
            links: To other processes, all of which open their parts at once.
        """
        self._plan = plan
        self.capture: Capture = "none"
        self._launch: list[Callable[[], None]] = []
        self._pieces: PieceGraphs | None = None
        """Where each captured piece is one graph of all its streams' runs."""
        self._linked: list[cuda.Graph] = []
        """Graphs that send and receive."""
        self._is_linked = links is not None
        self.refusal: str | None = None
        if links is not None:
            self._open_linked(source, custom_ops, links, is_captured=capture == "whole")
            return
        if not any(piece.captured for piece in plan.pieces):
            capture = "none"
        modes: tuple[Capture, ...] = ("whole", "ort", "none")
        reasons: list[str] = []
        for mode in modes[modes.index(capture) :]:
            try:
                self._open(mode, source, custom_ops)
            except (OnnxschedError, RuntimeError) as error:
                if mode == "none" or isinstance(error, DeviceError):
                    raise
                reasons.append(f"{mode}: {error}")
            else:
                self.capture = mode
                break
        self.refusal = "; ".join(reasons) or None

    def _open(self, mode: Capture, source: ModelSource, custom_ops: tuple[str, ...]) -> None:
        self._runner: LaneRunner | SegmentRunner
        self._pieces = None
        if mode == "whole":
            self._runner = runner = LaneRunner(source, self._plan, custom_ops)
            self._pieces = PieceGraphs(runner)
        else:
            self._runner = SegmentRunner(
                source, self._plan, graph_capture=mode == "ort", custom_ops=custom_ops
            )
        try:
            self._prepare()
            buffers = self._runner.buffers
            ends = (buffers.get(name) for name in (*self._plan.inputs, *self._plan.outputs))
            if any(buffer is not None and buffer.is_large for buffer in ends):
                cuda.load_torch()  # which copies them, and takes seconds: not in the first run
        except BaseException:
            self.close()
            raise
        self._runner.forget_weights()

    def _open_linked(
        self,
        source: ModelSource,
        custom_ops: tuple[str, ...],
        links: NcclLinks,
        *,
        is_captured: bool,
    ) -> None:
        """Open what sends and receives; whatever is refused here is no matter to other ranks."""
        self._runner = runner = SegmentRunner(
            source, self._plan, custom_ops=custom_ops, links=links
        )
        try:
            issues = [partial(runner.issue, piece) for piece in self._plan.pieces]
            for piece in self._plan.pieces:
                runner.prepare(piece)
            links.wait_until_ready()
            for piece, issue in zip(self._plan.pieces, issues, strict=True):
                runner.clear(self._plan.inputs, piece)  # where others may have warmed up
                issue()  # ranks connect when they first send, which no capture allows
            self._end_stream().synchronize()
            self._launch = list(issues)
            if is_captured:
                self._capture_linked(issues)
        except BaseException:
            self.close()
            raise
        runner.forget_weights()

    def _capture_linked(self, issues: Sequence[Callable[[], None]]) -> None:
        mains = [self._runner.streams[piece.main] for piece in self._plan.pieces]
        try:
            for main, issue in zip(mains, issues, strict=True):
                self._linked.append(cuda.Graph.capture(main, issue))
        except (OnnxschedError, RuntimeError) as error:
            self.refusal = f"whole: {error}"
            return
        pairs = zip(self._linked, mains, strict=True)
        self._launch = [partial(graph.launch, main) for graph, main in pairs]
        self.capture = "whole"

    def _prepare(self) -> None:
        runner = self._runner
        for number, piece in enumerate(self._plan.pieces):
            runner.prepare(piece)
            if not piece.captured:
                self._launch.append(lambda: None)
            elif isinstance(runner, SegmentRunner):
                self._launch.append(partial(runner.issue, piece))
            else:
                assert self._pieces is not None
                self._pieces.opened(number)
                main = runner.streams[piece.main]
                self._launch.append(partial(self._pieces.launch, number, main))

    @property
    def main_stream(self) -> cuda.Stream:
        """The stream that inputs are copied on and that the first piece starts from."""
        return self._runner.streams[self._plan.pieces[0].main]

    @property
    def graph_count(self) -> int:
        """How many CUDA graphs of ours a run launches."""
        is_whole = self.capture == "whole"
        return sum(piece.captured for piece in self._plan.pieces) if is_whole else 0

    def launch(self) -> None:
        """Launch a plan that is one captured piece, on what its input buffers hold."""
        self._launch[0]()

    @property
    def is_one_piece(self) -> bool:
        """Whether a run is one launch with nothing left to the host."""
        return len(self._plan.pieces) == 1 and self._plan.pieces[0].captured

    @property
    def is_one_graph(self) -> bool:
        """Whether a run is one launch of a graph that copies all but large tensors too."""
        return self._pieces is not None and self.is_one_piece

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run and return the named outputs as host values.

        Args:
            feeds: Host values of every model input.
            outputs: Names of model outputs.
        """
        if self._pieces is not None and self.is_one_piece:
            return self._pieces.run(feeds, outputs)
        with self._awaited_where_broken():
            values = self._run_pieces(feeds, lambda buffer, array, s: buffer.fill(array, s))
            values |= self._fetched([n for n in outputs if n not in values], self._end_stream())
        return [values[name] for name in outputs]

    def run_on_device(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run on device tensors, ordered by torch's current streams, without a host copy.

        Args:
            feeds: DLPack objects, one for every model input; arrays for those that
                `reads_on_host`.
            outputs: Names of model outputs; they come as new torch tensors, each ready on the
                current stream of its device.

        Raises:
            UsageError: A tensor is of another shape or type than its input.
        """
        device = self.main_stream.device
        tensors = dict(feeds)
        for name in [name for name in feeds if not self.reads_on_host(name)]:
            tensor = tensors[name] = cuda.tensor_on_device(feeds[name], device)
            cuda.require_fit(name, self._runner.buffers[name].kind, tensor)
        buffers = {n: self._runner.buffers[n] for n in outputs if n in self._runner.buffers}
        # Made before the wait: what torch gives may still be read by what the caller has issued.
        results = {name: buffer.new_tensor() for name, buffer in buffers.items()}
        devices = dict.fromkeys([device, *(self._plan.device_of[name] for name in buffers)])
        with self._awaited_where_broken():
            for used in devices:
                self.main_stream.wait_for_caller(used)
            values = self._run_pieces(tensors, lambda b, t, s: b.fill_from_tensor(t, s))
            stream = self._end_stream()
            for name, tensor in results.items():
                if name not in values:
                    buffers[name].copy_to_tensor(tensor, stream)
            for used in devices:
                stream.release_to_caller(used)
        return [_device_value(values[n], device) if n in values else results[n] for n in outputs]

    def reads_on_host(self, name: str) -> bool:
        """Whether only pieces on the host read an input."""
        return name not in self._runner.buffers

    @contextmanager
    def _awaited_where_broken(self) -> Iterator[None]:
        """After an error wait for what was issued: the next run, or who frees, takes its memory.

        Not where other ranks take part, whom a broken run would wait for.
        """
        try:
            yield
        except BaseException:
            for stream in () if self._is_linked else self._runner.streams.values():
                stream.synchronize()
            raise

    def _fetched(self, names: Iterable[str], stream: cuda.Stream) -> dict[str, np.ndarray]:
        """What buffers hold after all that was issued on a stream, as host arrays."""
        fetches = {name: self._runner.buffers[name].fetched(stream) for name in names}
        arrays = {name: fetch() for name, fetch in fetches.items()}
        stream.synchronize()
        return arrays

    def _end_stream(self) -> cuda.Stream:
        return self._runner.streams[self._plan.pieces[-1].main]

    def _run_pieces(
        self, feeds: Mapping[str, Any], fill: Callable[[cuda.Buffer, Any, cuda.Stream], None]
    ) -> dict[str, Any]:
        """Run everything; returns the values that live on the host."""
        values: dict[str, Any] = {}
        if (end := self._end_stream()) is not self.main_stream:
            self.main_stream.wait(end.record())  # the run before may still read its buffers
        for name, value in feeds.items():
            if name in self._runner.buffers:
                fill(self._runner.buffers[name], value, self.main_stream)
            else:
                values[name] = value
        for piece, launch in zip(self._plan.pieces, self._launch, strict=True):
            if piece.captured:
                launch()
            else:
                self._run_on_host(piece, values)
        return values

    def _run_on_host(self, piece: Piece, values: dict[str, Any]) -> None:
        """Run a host piece between graph launches: fetch, run, fill."""
        buffers = self._runner.buffers
        for stream in self._runner.streams.values():
            stream.synchronize()
        stream = self._runner.streams[piece.main]
        (index,) = piece.runs
        segment = self._plan.segments[index]
        feeds = self._fetched([name for name in segment.inputs if name in buffers], stream)
        feeds |= {name: values[name] for name in segment.inputs if name not in feeds}
        results = self._runner.sessions[index].run(feeds, segment.outputs)
        for name, value in zip(segment.outputs, results, strict=True):
            if name in buffers:
                buffers[name].fill(np.asarray(value), stream)
            else:
                values[name] = value
        stream.synchronize()

    def close(self) -> None:
        """Free the graphs, then what they launch; whatever fails, all the rest is freed."""
        with ExitStack() as owner:
            owner.callback(self._runner.close)
            for graph in self._linked:
                owner.callback(graph.close)
            if self._pieces is not None:
                owner.callback(self._pieces.close)
            self._linked, self._launch = [], []
            for device in self._plan.devices:
                owner.callback(cuda.synchronize, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device_value(value: Any, device: Device) -> Any:
    """A host array as a torch tensor on the device; a sequence, or nothing, as it is."""
    return cuda.tensor_of_array(value, device) if isinstance(value, np.ndarray) else value
