"""CUDA graphs: captured, taken apart, put together and launched."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from onnxsched_runtime.cuda.binding import (
    check,
    check_driver,
    cudart,
    current_device,
    driver,
)
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError, OnnxschedError
from onnxsched_runtime.wiring import ChainNode, WiredNode

_ALIGNMENT_NBYTES = 512
"""Of workspaces: what `cudaMallocAsync` gives."""


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, native: Any) -> None:
        runtime = cudart()
        flag = runtime.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagAutoFreeOnLaunch
        try:
            self.node_kinds = Counter(_kind(node) for node in _nodes(native))
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
        native = _captured(main, issue)
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


@dataclass(frozen=True, slots=True)
class _Allocation:
    """Memory that a captured run allocates for itself, and where that lies in a workspace."""

    address: int
    nbytes: int
    offset: int


class Chain:
    """What one run launches, captured to be copied into a graph; never launched itself."""

    def __init__(self, native: Any, marks: Mapping[int, int], device: Device) -> None:
        """Read a captured graph, and own it."""
        self._native = native
        self._device = device
        self._nodes = _nodes(native)
        self._kinds = [_kind(node) for node in self._nodes]
        number = {int(node): index for index, node in enumerate(self._nodes)}
        predecessors: list[list[int]] = [[] for _ in self._nodes]
        for source, target in _edges(native):
            predecessors[number[int(target)]].append(number[int(source)])
        self.nodes = tuple(
            ChainNode(tuple(earlier), self._mark(index, marks), self._kinds[index] in _WORK)
            for index, earlier in enumerate(predecessors)
        )
        self._allocations = self._placed()
        ends = (a.offset + a.nbytes for a in self._allocations)
        self.workspace_nbytes = max(ends, default=0)
        """What it allocates while it runs."""
        if strange := set(self._kinds) - _WORK - _IDLE:
            raise CaptureError(f"The captured run holds {min(strange)} nodes, unsafe to replay.")
        if any(earlier >= i for i, n in enumerate(self.nodes) for earlier in n.predecessors):
            raise CaptureError("The captured run is not in order.")

    @classmethod
    def capture(
        cls, stream: Stream, issue: Callable[[], None], marks: Mapping[int, int] | None = None
    ) -> Self:
        """Capture what `issue` launches on a stream.

        Args:
            stream: The stream.
            issue: Launches on it.
            marks: The number of each mark, by the address that it copies to.

        Raises:
            CaptureError: Something that was issued can't be captured or copied.
        """
        native = _captured(stream, issue)
        try:
            return cls(native, marks or {}, stream.device)
        except OnnxschedError as error:
            cudart().cudaGraphDestroy(native)
            raise CaptureError(f"The capture was refused ({error})") from error

    def _mark(self, index: int, marks: Mapping[int, int]) -> int | None:
        if self._kinds[index] != "MEMCPY" or not marks:
            return None
        copy = check(cudart().cudaGraphMemcpyNodeGetParams(self._nodes[index]))
        return marks.get(int(copy.dstPtr.ptr or 0))

    def _placed(self) -> tuple[_Allocation, ...]:
        """Give each allocation a place beside those that are live when it is made."""
        live: dict[int, _Allocation] = {}
        placed = []
        for node, kind in zip(self._nodes, self._kinds, strict=True):
            native = driver().CUgraphNode(int(node))
            if kind == "MEM_ALLOC":
                made = check_driver(driver().cuGraphMemAllocNodeGetParams(native))
                nbytes = -(-int(made.bytesize) // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
                offset = 0
                for other in sorted(live.values(), key=lambda a: a.offset):
                    if offset + nbytes <= other.offset:
                        break
                    offset = max(offset, other.offset + other.nbytes)
                allocation = _Allocation(int(made.dptr), nbytes, offset)
                live[allocation.address] = allocation
                placed.append(allocation)
            elif kind == "MEM_FREE":
                live.pop(int(check_driver(driver().cuGraphMemFreeNodeGetParams(native))), None)
        return tuple(placed)

    def copy_into(self, graph: Any, index: int, after: list[Any], workspace: int) -> Any:
        """Copy a node into another graph, behind other nodes of it; returns the copy."""
        api = driver()
        node = api.CUgraphNode(int(self._nodes[index]))
        moved = [(a.address, a.nbytes, workspace + a.offset) for a in self._allocations]
        if self._kinds[index] == "KERNEL":
            kernel = check_driver(api.cuGraphKernelNodeGetParams(node))
            if moved:
                kept = _moved_arguments(kernel, moved)
            copy = check_driver(api.cuGraphAddKernelNode(graph, after, len(after), kernel))
            check_driver(api.cuGraphKernelNodeCopyAttributes(copy, node))
            del kernel
            if moved:
                del kept  # the graph has copied the arguments
            return copy
        with current_device(self._device):
            context = check_driver(api.cuCtxGetCurrent())
        if self._kinds[index] == "MEMCPY":
            transfer = check_driver(api.cuGraphMemcpyNodeGetParams(node))
            if moved:
                transfer.srcDevice = _moved(int(transfer.srcDevice), moved)
                transfer.dstDevice = _moved(int(transfer.dstDevice), moved)
            return check_driver(
                api.cuGraphAddMemcpyNode(graph, after, len(after), transfer, context)
            )
        fill = check_driver(api.cuGraphMemsetNodeGetParams(node))
        if moved:
            fill.dst = _moved(int(fill.dst), moved)
        return check_driver(api.cuGraphAddMemsetNode(graph, after, len(after), fill, context))

    def close(self) -> None:
        """Destroy it; copies live on."""
        if self._native is not None:
            check(cudart().cudaGraphDestroy(self._native))
            self._native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WORK = {"KERNEL", "MEMCPY", "MEMSET"}
_IDLE = {"EMPTY", "MEM_ALLOC", "MEM_FREE"}


def _captured(main: Stream, issue: Callable[[], None]) -> Any:
    """The native graph of what `issue` launches."""
    runtime = cudart()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    check(runtime.cudaStreamBeginCapture(main.handle, mode))
    try:
        issue()
    except Exception as error:
        abandoned = runtime.cudaStreamEndCapture(main.handle)[1]
        if abandoned is not None and int(abandoned):
            runtime.cudaGraphDestroy(abandoned)
        raise CaptureError(f"The capture was refused ({error}).") from error
    try:
        return check(runtime.cudaStreamEndCapture(main.handle))
    except OnnxschedError as error:
        raise CaptureError(f"The capture was refused ({error})") from error


def _nodes(graph: Any) -> list[Any]:
    _, count = check(cudart().cudaGraphGetNodes(graph, 0))
    nodes, _ = check(cudart().cudaGraphGetNodes(graph, count))
    return list(nodes[:count])


def _edges(graph: Any) -> list[tuple[Any, Any]]:
    """Pairs of nodes; CUDA 13 returns data beside them, CUDA 12 does not."""
    count = check(cudart().cudaGraphGetEdges(graph, 0))[-1]
    found = check(cudart().cudaGraphGetEdges(graph, count))
    return list(zip(found[0][:count], found[1][:count], strict=True))


def _kind(node: Any) -> str:
    kind = check_driver(driver().cuGraphNodeGetType(driver().CUgraphNode(int(node))))
    return str(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_"))


def _moved(address: int, moved: Iterable[tuple[int, int, int]]) -> int:
    for start, nbytes, target in moved:
        if start <= address < start + nbytes:
            return target + address - start
    return address


def _moved_arguments(kernel: Any, moved: Sequence[tuple[int, int, int]]) -> Any:
    """Let a kernel work on moved memory; returns what must live until the kernel is copied.

    A kernel's arguments are opaque, but what lies in the address range of an allocation is a
    pointer into it: nothing else has numbers of that size.
    """
    if not int(kernel.kernelParams):
        raise CaptureError("A captured kernel hides its arguments, so its memory can't be moved.")
    sizes: list[int] = []
    while (size := _argument_nbytes(kernel, len(sizes))) is not None:
        sizes.append(size)
    given = (ctypes.c_void_p * len(sizes)).from_address(int(kernel.kernelParams))
    arguments = []
    for address, size in zip(given, sizes, strict=True):
        argument = ctypes.create_string_buffer(ctypes.string_at(address, size), size)
        for offset in range(0, size - 7, 8):
            word = ctypes.c_uint64.from_buffer(argument, offset)
            word.value = _moved(word.value, moved)
        arguments.append(argument)
    pointers = (ctypes.c_void_p * len(sizes))(*map(ctypes.addressof, arguments))
    kernel.kernelParams = ctypes.addressof(pointers)
    return arguments, pointers


def _argument_nbytes(kernel: Any, index: int) -> int | None:
    api = driver()
    if int(kernel.kern or 0):
        error, _, size = api.cuKernelGetParamInfo(kernel.kern, index)
    else:
        error, _, size = api.cuFuncGetParamInfo(kernel.func, index)
    return None if int(error) else int(size)
