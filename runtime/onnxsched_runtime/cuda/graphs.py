"""CUDA graphs: captured, put together and launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from onnxsched_runtime.cuda.binding import check, check_driver, cudart, driver
from onnxsched_runtime.cuda.capturing import captured, kind_of, nodes_of
from onnxsched_runtime.cuda.chains import Chain
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.errors import CaptureError, OnnxschedError
from onnxsched_runtime.wiring import WiredNode


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, native: Any) -> None:
        runtime = cudart()
        flag = runtime.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagAutoFreeOnLaunch
        try:
            self.node_kinds = Counter(kind_of(node) for node in nodes_of(native))
            self._exec = check(runtime.cudaGraphInstantiate(native, flag))
        finally:
            runtime.cudaGraphDestroy(native)

    @classmethod
    def capture(cls, main: Stream, issue: Callable[[], None]) -> Self:
        """Capture what `issue` launches on `main` and on streams forked from it.

        Raises:
            CaptureError: Something that was issued can't be captured, or it left host nodes,
                which would run callbacks meant to run once at every replay.
        """
        native = captured(main, issue)
        try:
            graph = cls(native)
        except OnnxschedError as error:
            raise CaptureError(f"The capture was refused ({error})") from error
        if hosts := graph.node_kinds["HOST"]:
            graph.close()
            raise CaptureError(f"The captured graph holds {hosts} host nodes, unsafe to replay.")
        return graph

    @classmethod
    def assemble(
        cls,
        chains: Sequence[Chain],
        wired: Iterable[WiredNode],
        workspaces: Sequence[int],
    ) -> Self:
        """Put captured runs, of one device or several, together as one graph.

        Args:
            chains: The runs.
            wired: Their nodes with what each waits for.
            workspaces: The address of each chain's workspace, of at least its `workspace_nbytes`.

        Raises:
            CaptureError: CUDA refuses, with the reason.
        """
        try:
            native = check_driver(driver().cuGraphCreate(0))
            graph = cudart().cudaGraph_t(int(native))
            try:
                made: list[Any] = []
                for node in wired:
                    after = [made[position] for position in node.predecessors]
                    workspace = workspaces[node.chain]
                    made.append(chains[node.chain].copy_into(native, node.index, after, workspace))
            except BaseException:
                cudart().cudaGraphDestroy(graph)
                raise
            return cls(graph)
        except OnnxschedError as error:
            raise CaptureError(f"The graph was refused ({error})") from error

    def launch(self, stream: Stream) -> None:
        """Replay on a stream."""
        check(cudart().cudaGraphLaunch(self._exec, stream.handle))

    def close(self) -> None:
        """Destroy the graph."""
        if self._exec is not None:
            check(cudart().cudaGraphExecDestroy(self._exec))
            self._exec = None
