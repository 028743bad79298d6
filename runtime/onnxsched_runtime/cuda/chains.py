"""Captured runs that are copied into graphs, with memory of ours for what they allocate."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from onnxsched_runtime.cuda.binding import (
    check,
    check_driver,
    cudart,
    current_device,
    driver,
)
from onnxsched_runtime.cuda.capturing import captured, edges_of, kind_of, nodes_of
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import CaptureError, OnnxschedError
from onnxsched_runtime.wiring import ChainNode

_ALIGNMENT_NBYTES = 512
"""Of workspaces: what `cudaMallocAsync` gives."""
_LEAST_ADDRESS, _LEAST_NO_ADDRESS = 1 << 32, 1 << 57
"""No GPU has memory below or above, which most arguments show to be numbers."""
_WORK = {"KERNEL", "MEMCPY", "MEMSET"}
_IDLE = {"EMPTY", "MEM_ALLOC", "MEM_FREE"}


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
        self._nodes = nodes_of(native)
        self._kinds = [kind_of(node) for node in self._nodes]
        number = {int(node): index for index, node in enumerate(self._nodes)}
        predecessors: list[list[int]] = [[] for _ in self._nodes]
        for source, target in edges_of(native):
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
        if any(map(self._reads_pageable, range(len(self._nodes)))):
            raise CaptureError("The captured run reads host memory that may be gone by then.")
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
        native = captured(stream, issue)
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

    def _reads_pageable(self, index: int) -> bool:
        """Whether a node copies from host memory other than pinned.

        Pinned memory is the session's own, and what it holds stays: the session never runs again.
        """
        if self._kinds[index] != "MEMCPY":
            return False
        runtime = cudart()
        copy = check(runtime.cudaGraphMemcpyNodeGetParams(self._nodes[index]))
        if copy.kind == runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            return False
        found = check(runtime.cudaPointerGetAttributes(int(copy.srcPtr.ptr or 0)))
        return bool(found.type == runtime.cudaMemoryType.cudaMemoryTypeUnregistered)

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

    def reaches_only(self, places: Iterable[tuple[int, int]]) -> bool:
        """Whether all memory that its nodes are given is its own or lies in these places.

        What a node is given counts as an address where CUDA knows memory there.
        O(words x log places).

        Args:
            places: Starts and sizes in bytes.
        """
        own = [(a.address, a.nbytes) for a in self._allocations]
        known = _joined((start, start + nbytes) for start, nbytes in (*places, *own))
        starts = [start for start, _ in known]

        def is_known(address: int) -> bool:
            position = bisect_right(starts, address) - 1
            return position >= 0 and address < known[position][1]

        return all(
            word is not None and (is_known(word) or not _is_memory(word))
            for index in range(len(self._nodes))
            for word in self._given(index)
        )

    def _given(self, index: int) -> Iterator[int | None]:
        """What a node is given, addresses among it; None for what is hidden or a host's."""
        api = driver()
        node, kind = api.CUgraphNode(int(self._nodes[index])), self._kinds[index]
        if kind == "KERNEL":
            kernel = check_driver(api.cuGraphKernelNodeGetParams(node))
            if not int(kernel.kernelParams):
                yield None
                return
            for argument in _arguments(kernel):
                yield from (word.value for word in _words(argument))
        elif kind == "MEMCPY":
            copy = check_driver(api.cuGraphMemcpyNodeGetParams(node))
            for where, address in (
                (copy.srcMemoryType, copy.srcDevice),
                (copy.dstMemoryType, copy.dstDevice),
            ):
                is_known = where in (
                    api.CUmemorytype.CU_MEMORYTYPE_DEVICE,
                    api.CUmemorytype.CU_MEMORYTYPE_UNIFIED,
                )
                yield int(address) if is_known else None
        elif kind == "MEMSET":
            yield int(check_driver(api.cuGraphMemsetNodeGetParams(node)).dst)

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
    arguments = _arguments(kernel)
    for word in (word for argument in arguments for word in _words(argument)):
        word.value = _moved(word.value, moved)
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    kernel.kernelParams = ctypes.addressof(pointers)
    return arguments, pointers


def _arguments(kernel: Any) -> list[ctypes.Array[ctypes.c_char]]:
    """Copies of the arguments of a kernel that does not hide them."""
    sizes: list[int] = []
    while (size := _argument_nbytes(kernel, len(sizes))) is not None:
        sizes.append(size)
    given = (ctypes.c_void_p * len(sizes)).from_address(int(kernel.kernelParams))
    return [
        ctypes.create_string_buffer(ctypes.string_at(address, size), size)
        for address, size in zip(given, sizes, strict=True)
    ]


def _words(argument: ctypes.Array[ctypes.c_char]) -> list[ctypes.c_uint64]:
    """Wherever an address may lie in an argument."""
    offsets = range(0, len(argument) - 7, 8)
    return [ctypes.c_uint64.from_buffer(argument, offset) for offset in offsets]


def _joined(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals, sorted, those that meet made one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _is_memory(word: int) -> bool:
    """Whether CUDA knows memory at an address."""
    if not _LEAST_ADDRESS <= word < _LEAST_NO_ADDRESS:
        return False
    runtime = cudart()
    error, found = runtime.cudaPointerGetAttributes(word)
    is_unknown = found is None or found.type == runtime.cudaMemoryType.cudaMemoryTypeUnregistered
    return not (int(error) or is_unknown)


def _argument_nbytes(kernel: Any, index: int) -> int | None:
    api = driver()
    if int(kernel.kern or 0):
        error, _, size = api.cuKernelGetParamInfo(kernel.kern, index)
    else:
        error, _, size = api.cuFuncGetParamInfo(kernel.func, index)
    return None if int(error) else int(size)
