"""The CUDA graphs of captured pieces, with and without copies of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxsched_runtime import cuda
from onnxsched_runtime.executors.lanes import LaneRunner

_MOST_WITH_COPIES = 4
"""Who asks for ever other outputs waits for a graph to be put together each time."""


@dataclass(frozen=True, slots=True)
class GraphRun:
    """All that a run on host arrays needs, looked up once."""

    graph: cuda.Graph
    stream: cuda.Stream
    filled: tuple[tuple[str, cuda.Buffer], ...]
    """Inputs that are copied in parts before the graph is launched: the large ones."""
    staged: tuple[tuple[str, cuda.Buffer], ...]
    """Inputs that the graph copies from pinned memory."""
    outputs: Mapping[str, np.ndarray | None]
    """Pinned memory that the graph copies to; none for an input that is an output and not read."""
    fetched: tuple[tuple[str, cuda.Buffer], ...]
    """Outputs that are copied in parts after the graph."""


class PieceGraphs:
    """Graphs that are put together when they are asked for; a runner has prepared their pieces.

    A graph of several streams takes megabytes of a GPU, so one with copies takes the place of the
    one without.
    """

    def __init__(self, runner: LaneRunner) -> None:
        self._runner = runner
        self.plain: dict[int, cuda.Graph] = {}
        """Those without copies, by the numbers of their pieces."""
        self.with_copies: dict[frozenset[str], GraphRun] = {}
        """Those of the only piece that copy all inputs in and some outputs out, by the names of
        these: the last few that were asked for."""

    def launch(self, number: int, main: cuda.Stream) -> None:
        """Launch a piece, by its number, on what its input buffers hold."""
        self.opened(number).launch(main)

    def opened(self, number: int) -> cuda.Graph:
        """The graph of a piece, put together where it is not there.

        Raises:
            CaptureError: CUDA or ORT refuse, with the reason.
        """
        graph = self.plain.get(number)
        if graph is None:
            piece = self._runner.plan.pieces[number]
            graph = self.plain[number] = self._runner.capture(piece)
        return graph

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run the only piece on host arrays with the copies of all but large ones in the graph."""
        wanted = frozenset(outputs)
        ready = self.with_copies.pop(wanted, None) or self._made_ready(feeds, sorted(wanted))
        self.with_copies[wanted] = ready  # last, as the latest that was asked for
        for name, buffer in ready.filled:
            buffer.fill(feeds[name], ready.stream)
        for name, buffer in ready.staged:
            buffer.stage(feeds[name])
        ready.graph.launch(ready.stream)
        fetches = [(name, buffer.fetched(ready.stream)) for name, buffer in ready.fetched]
        values = {name: fetch() for name, fetch in fetches}
        ready.stream.synchronize()
        for name, array in ready.outputs.items():
            values[name] = np.array(feeds[name] if array is None else array)
        return [values[name] for name in outputs]

    def _made_ready(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> GraphRun:
        """A graph with the copies, instead of the one without."""
        (piece,) = self._runner.plan.pieces
        main, buffers = self._runner.streams[piece.main], self._runner.buffers
        if (graph := self.plain.pop(0, None)) is not None:
            main.synchronize()
            graph.close()
        if len(self.with_copies) == _MOST_WITH_COPIES:  # runs end before they return
            self.with_copies.pop(next(iter(self.with_copies))).graph.close()
        given = [(name, buffers[name]) for name in feeds if name in buffers]
        taken = [(name, buffers[name]) for name in outputs if name in buffers]
        staged = tuple((name, buffer) for name, buffer in given if not buffer.is_large)
        copied = {name: buffer.staging for name, buffer in taken if not buffer.is_large}
        return GraphRun(
            self._runner.capture(piece, [name for name, _ in staged], list(copied)),
            main,
            tuple((name, buffer) for name, buffer in given if buffer.is_large),
            staged,
            copied | {name: None for name in outputs if name not in buffers},
            tuple((name, buffer) for name, buffer in taken if buffer.is_large),
        )

    def close(self) -> None:
        """Destroy them; none runs any more."""
        with ExitStack() as owner:
            for graph in (*self.plain.values(), *(run.graph for run in self.with_copies.values())):
                owner.callback(graph.close)
            self.plain, self.with_copies = {}, {}
