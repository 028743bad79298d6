"""What a stream captured, as CUDA hands it out: nodes, edges, kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxsched_runtime.cuda.binding import check, check_driver, cudart, driver
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.errors import CaptureError, OnnxschedError


def captured(main: Stream, issue: Callable[[], None]) -> Any:
    """The native graph of what `issue` launches on a stream; the caller destroys it.

    Raises:
        CaptureError: Something that was issued can't be captured.
    """
    runtime = cudart()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    check(runtime.cudaStreamBeginCapture(main.handle, mode))
    try:
        issue()
    except BaseException as error:
        abandoned = runtime.cudaStreamEndCapture(main.handle)[1]
        if abandoned is not None and int(abandoned):
            runtime.cudaGraphDestroy(abandoned)
        if not isinstance(error, Exception):
            raise
        raise CaptureError(f"The capture was refused ({error}).") from error
    try:
        return check(runtime.cudaStreamEndCapture(main.handle))
    except OnnxschedError as error:
        raise CaptureError(f"The capture was refused ({error})") from error


def nodes_of(graph: Any) -> list[Any]:
    """The nodes of a native graph."""
    _, count = check(cudart().cudaGraphGetNodes(graph, 0))
    nodes, _ = check(cudart().cudaGraphGetNodes(graph, count))
    return list(nodes[:count])


def edges_of(graph: Any) -> list[tuple[Any, Any]]:
    """Pairs of nodes; CUDA 13 returns data beside them, CUDA 12 does not."""
    count = check(cudart().cudaGraphGetEdges(graph, 0))[-1]
    found = check(cudart().cudaGraphGetEdges(graph, count))
    return list(zip(found[0][:count], found[1][:count], strict=True))


def kind_of(node: Any) -> str:
    """What a node does, e.g. `KERNEL`."""
    kind = check_driver(driver().cuGraphNodeGetType(driver().CUgraphNode(int(node))))
    return str(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_"))
