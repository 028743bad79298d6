"""The CUDA graphs of captured pieces, with and without copies of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    inputs: tuple[tuple[str, cuda.Buffer], ...]
    outputs: Mapping[str, np.ndarray | None]
    """Pinned memory that the graph copies to; none for an input that is an output and not read."""


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
        """Run the only piece on host arrays with the copies in the graph: in one launch."""
        wanted = frozenset(outputs)
        ready = self.with_copies.pop(wanted, None) or self._made_ready(feeds, sorted(wanted))
        self.with_copies[wanted] = ready  # last, as the latest that was asked for
        for name, buffer in ready.inputs:
            buffer.stage(feeds[name])
        ready.graph.launch(ready.stream)
        ready.stream.synchronize()
        arrays = ready.outputs
        return [np.array(feeds[n] if arrays[n] is None else arrays[n]) for n in outputs]

    def _made_ready(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> GraphRun:
        """A graph with the copies, instead of the one without."""
        (piece,) = self._runner.plan.pieces
        main, buffers = self._runner.streams[piece.main], self._runner.buffers
        if (graph := self.plain.pop(0, None)) is not None:
            main.synchronize()
            graph.close()
        if len(self.with_copies) == _MOST_WITH_COPIES:  # runs end before they return
            self.with_copies.pop(next(iter(self.with_copies))).graph.close()
        names = [name for name in feeds if name in buffers]
        return GraphRun(
            self._runner.capture(piece, names, [n for n in outputs if n in buffers]),
            main,
            tuple((name, buffers[name]) for name in names),
            {n: buffers[n].staging if n in buffers else None for n in outputs},
        )

    def close(self) -> None:
        """Destroy them; none runs any more."""
        for graph in (*self.plain.values(), *(run.graph for run in self.with_copies.values())):
            graph.close()
        self.plain, self.with_copies = {}, {}
