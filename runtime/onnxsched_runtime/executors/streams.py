"""The CUDA executor: the plan over CUDA streams, captured into graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np

from onnxsched_runtime import cuda
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import DeviceError, OnnxschedError
from onnxsched_runtime.executors.lanes import LaneRunner
from onnxsched_runtime.executors.segments import SegmentRunner
from onnxsched_runtime.group import NcclLinks
from onnxsched_runtime.model import ModelSource
from onnxsched_runtime.plan import ExecutionPlan, Piece

Capture = Literal["whole", "ort", "none"]


@dataclass(frozen=True, slots=True)
class _GraphRun:
    """All that a run on host arrays needs, looked up once."""

    graph: cuda.Graph
    stream: cuda.Stream
    inputs: tuple[tuple[str, cuda.Buffer], ...]
    outputs: tuple[np.ndarray, ...]
    """Pinned memory that the graph copies to."""


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
        self._graphs: dict[int, cuda.Graph] = {}
        """Those without copies, by the numbers of their pieces."""
        self._with_copies: dict[tuple[str, ...], _GraphRun] = {}
        """Graphs that copy all inputs in and some outputs out, by the names of these."""
        self.refusal: str | None = None
        self.is_one_graph = False
        """Whether a run is one launch of a graph that copies inputs and outputs too."""
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
        if mode == "whole":
            self._runner = LaneRunner(source, self._plan, custom_ops)
        else:
            self._runner = SegmentRunner(
                source, self._plan, graph_capture=mode == "ort", custom_ops=custom_ops
            )
        try:
            self._prepare(mode)
            self.is_one_graph = mode == "whole" and self.is_one_piece
        except BaseException:
            self.close()
            raise

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
            for issue in issues:  # ranks connect when they first send, which no capture allows
                issue()
            self._end_stream().synchronize()
            self._launch = list(issues)
            if is_captured:
                self._capture_linked(issues)
        except BaseException:
            self.close()
            raise

    def _capture_linked(self, issues: Sequence[Callable[[], None]]) -> None:
        try:
            for number, (piece, issue) in enumerate(zip(self._plan.pieces, issues, strict=True)):
                main = self._runner.streams[piece.main]
                self._graphs[number] = cuda.Graph.capture(main, issue)
        except (OnnxschedError, RuntimeError) as error:
            self.refusal = f"whole: {error}"
            return
        self._launch = [
            partial(graph.launch, self._runner.streams[self._plan.pieces[number].main])
            for number, graph in self._graphs.items()
        ]
        self.capture = "whole"

    def _prepare(self, mode: Capture) -> None:
        for number, piece in enumerate(self._plan.pieces):
            self._runner.prepare(piece)
            if not piece.captured:
                self._launch.append(lambda: None)
            elif isinstance(self._runner, SegmentRunner):
                issue = self._runner.issue
                self._launch.append(lambda piece=piece, issue=issue: issue(piece))  # type: ignore[misc]
            else:
                self._piece_graph(number)
                main = self._runner.streams[piece.main]
                self._launch.append(partial(self._launch_piece, number, main))

    def _launch_piece(self, number: int, main: cuda.Stream) -> None:
        self._piece_graph(number).launch(main)

    def _piece_graph(self, number: int) -> cuda.Graph:
        """The graph of a piece without copies, put together where it is not there."""
        graph = self._graphs.get(number)
        if graph is None:
            assert isinstance(self._runner, LaneRunner)
            graph = self._graphs[number] = self._runner.capture(self._plan.pieces[number])
        return graph

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

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run and return the named outputs as host values.

        Args:
            feeds: Host values of every model input.
            outputs: Names of model outputs.
        """
        if self.is_one_graph:
            return self._run_in_one_graph(feeds, outputs)
        values = self._run_pieces(feeds, lambda buffer, array, s: buffer.fill(array, s))
        stream = self._end_stream()
        fetched = [name for name in outputs if name not in values]
        for name in fetched:
            self._runner.buffers[name].fetch(stream)
        stream.synchronize()
        return [
            self._runner.buffers[n].staging.copy() if n in fetched else values[n] for n in outputs
        ]

    def _run_in_one_graph(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run with the copies in the graph, so that a run is one launch."""
        ready = self._with_copies.get(tuple(outputs))
        if ready is None:
            ready = self._made_ready(feeds, outputs)
        for name, buffer in ready.inputs:
            buffer.stage(feeds[name])
        ready.graph.launch(ready.stream)
        ready.stream.synchronize()
        return [array.copy() for array in ready.outputs]

    def _made_ready(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> _GraphRun:
        """A graph with the copies, instead of the one without: both would take memory."""
        buffers = self._runner.buffers
        names = [name for name in feeds if name in buffers]
        assert isinstance(self._runner, LaneRunner)
        (piece,) = self._plan.pieces
        if (graph := self._graphs.pop(0, None)) is not None:
            self.main_stream.synchronize()
            graph.close()
        ready = _GraphRun(
            self._runner.capture(piece, names, list(dict.fromkeys(outputs))),
            self.main_stream,
            tuple((name, buffers[name]) for name in names),
            tuple(buffers[name].staging for name in outputs),
        )
        self._with_copies[tuple(outputs)] = ready
        return ready

    def run_on_device(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        """Run on device tensors, ordered by torch's current stream, without a host copy.

        Args:
            feeds: DLPack objects, one for every model input.
            outputs: Names of model outputs; they come as new torch tensors.

        Raises:
            UsageError: A tensor is of another shape or type than its input.
        """
        device = self.main_stream.device
        tensors = {name: cuda.tensor_on_device(value, device) for name, value in feeds.items()}
        for name, tensor in tensors.items():
            if name in self._runner.buffers:
                self._runner.buffers[name].require_fit(name, tensor)
        self.main_stream.wait_for_caller()
        values = self._run_pieces(tensors, lambda b, t, s: b.fill_from_tensor(t, s))
        stream = self._end_stream()
        results = [
            _device_value(values[name], device)
            if name in values
            else self._runner.buffers[name].copy_to_new_tensor(stream)
            for name in outputs
        ]
        stream.release_to_caller()
        return results

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
        fetched = [name for name in segment.inputs if name in buffers]
        for name in fetched:
            buffers[name].fetch(stream)
        stream.synchronize()
        feeds = {name: buffers[name].staging.copy() for name in fetched}
        feeds |= {n: _host_value(values[n]) for n in segment.inputs if n not in feeds}
        results = self._runner.sessions[index].run(feeds, segment.outputs)
        for name, value in zip(segment.outputs, results, strict=True):
            if name in buffers:
                buffers[name].fill(np.asarray(value), stream)
            else:
                values[name] = value
        stream.synchronize()

    def close(self) -> None:
        """Free the graphs, then what they launch."""
        for device in self._plan.devices:
            cuda.synchronize(device)
        for graph in (*self._graphs.values(), *(run.graph for run in self._with_copies.values())):
            graph.close()
        self._graphs, self._with_copies = {}, {}
        self._launch = []
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device_value(value: Any, device: Device) -> Any:
    """A host array as a torch tensor on the device; a sequence as it is."""
    return value if isinstance(value, list) else cuda.tensor_on_device(value, device)


def _host_value(value: Any) -> Any:
    """A torch tensor as numpy; anything else as it is."""
    return value.cpu().numpy() if hasattr(value, "cpu") else value
