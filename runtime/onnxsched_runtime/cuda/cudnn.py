"""cuDNN's graph API, as far as convolutions and pools need it, through its C interface.

ONNX Runtime's CUDA provider and torch bring the library, and one of them has loaded it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsched_runtime.errors import OnnxschedError

_NAME = "cudnn64_9.dll" if os.name == "nt" else "libcudnn.so.9"

# kinds of values (cudnnBackendAttributeType_t), and their C types where that is no int
HANDLE, DATA_TYPE, BOOLEAN, INT64, FLOAT, DOUBLE, POINTER = 0, 1, 2, 3, 4, 5, 6
CONVOLUTION_MODE, HEURISTIC, KNOB_TYPE, NAN_MODE = 7, 8, 9, 10
NUMERICAL_NOTE, POINTWISE_MODE, DESCRIPTOR = 11, 14, 15
RESAMPLE_MODE, PADDING_MODE = 21, 22
_C_TYPES: dict[int, Any] = {
    HANDLE: ctypes.c_void_p,
    BOOLEAN: ctypes.c_bool,
    INT64: ctypes.c_int64,
    FLOAT: ctypes.c_float,
    DOUBLE: ctypes.c_double,
    POINTER: ctypes.c_void_p,
    DESCRIPTOR: ctypes.c_void_p,
}

# kinds of descriptors (cudnnBackendDescriptorType_t)
POINTWISE, CONVOLUTION, ENGINE, ENGINE_CONFIG, HEURISTICS, PLAN = 0, 1, 2, 3, 4, 5
KNOB_CHOICE, CONVOLUTION_FORWARD, POINTWISE_OPERATION = 7, 10, 13
OPERATION_GRAPH, VARIANT_PACK, TENSOR = 15, 16, 17
RESAMPLE, RESAMPLE_FORWARD = 24, 25

Attribute = tuple[int, int]
"""Its number (cudnnBackendAttributeName_t) and the kind of its values."""
POINTWISE_DOES, POINTWISE_PRECISION = (0, POINTWISE_MODE), (1, DATA_TYPE)
COMPUTES_IN, CONVOLVES_BY = (100, DATA_TYPE), (101, CONVOLUTION_MODE)
DILATIONS, STRIDES = (102, INT64), (103, INT64)
PADS_BEHIND, PADS_BEFORE, SPATIAL_RANK = (104, INT64), (105, INT64), (106, INT64)
HEURISTICS_BY, HEURISTICS_OF, PROPOSED = (200, HEURISTIC), (201, DESCRIPTOR), (202, DESCRIPTOR)
CONFIG_ENGINE, CONFIG_KNOBS = (300, DESCRIPTOR), (302, DESCRIPTOR)
PLAN_HANDLE, PLAN_CONFIG, PLAN_WORKSPACE = (400, HANDLE), (401, DESCRIPTOR), (402, INT64)
KNOB, KNOB_VALUE = (600, KNOB_TYPE), (601, INT64)
CONVOLVED_TIMES, KEPT_TIMES, FORM = (700, FLOAT), (701, FLOAT), (702, DESCRIPTOR)
FILTERS, IMAGE, CONVOLVED = (703, DESCRIPTOR), (704, DESCRIPTOR), (705, DESCRIPTOR)
DOES, READS, READS_TOO = (750, DESCRIPTOR), (751, DESCRIPTOR), (752, DESCRIPTOR)
WRITES = (753, DESCRIPTOR)
GRAPH_HANDLE, OPERATIONS = (800, HANDLE), (801, DESCRIPTOR)
ALIGNMENT, ELEMENT_TYPE, SHAPE = (900, INT64), (901, DATA_TYPE), (902, INT64)
TENSOR_STRIDES, NAME, IS_VIRTUAL = (903, INT64), (906, INT64), (907, BOOLEAN)
NAMES, ADDRESSES, WORKSPACE = (1000, INT64), (1001, POINTER), (1003, POINTER)
ENGINE_GRAPH, ENGINE_NUMBER = (1300, DESCRIPTOR), (1301, INT64)
ENGINE_NOTES = (1303, NUMERICAL_NOTE)
RESAMPLES_BY, RESAMPLES_IN = (1700, RESAMPLE_MODE), (1701, DATA_TYPE)
RESAMPLED_RANK, WINDOW_ENDS, WINDOW_BEGINS = (1702, INT64), (1703, INT64), (1704, INT64)
WINDOW_STRIDES, WINDOW = (1705, INT64), (1706, INT64)
RESAMPLED_NAN, RESAMPLED_PADDING = (1707, NAN_MODE), (1708, PADDING_MODE)
RESAMPLED, RESAMPLE_RESULT = (1710, DESCRIPTOR), (1711, DESCRIPTOR)
RESAMPLED_TIMES, RESULT_KEPT_TIMES = (1713, DOUBLE), (1714, DOUBLE)
RESAMPLE_FORM = (1716, DESCRIPTOR)


@functools.cache
def library() -> ctypes.CDLL:
    """The library.

    Raises:
        OnnxschedError: It is not to be found.
    """
    try:
        loaded = ctypes.CDLL(_NAME)
    except OSError as error:
        raise OnnxschedError(f"cuDNN does not load ({error}).") from error
    loaded.cudnnGetErrorString.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    loaded.cudnnBackendSetAttribute.argtypes = [pointer, number, number, ctypes.c_int64, pointer]
    loaded.cudnnBackendGetAttribute.argtypes = [
        pointer, number, number, ctypes.c_int64, pointer, pointer,
    ]  # fmt: skip
    loaded.cudnnBackendExecute.argtypes = [pointer, pointer, pointer]
    loaded.cudnnSetStream.argtypes = [pointer, pointer]
    loaded.cudnnBackendFinalize.argtypes = [pointer]
    loaded.cudnnBackendDestroyDescriptor.argtypes = [pointer]
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call one of its functions.

    Raises:
        OnnxschedError: It failed; many configurations of kernels do, where they are not supported.
    """
    status = getattr(library(), name)(*arguments)
    if status:
        text = library().cudnnGetErrorString(status).decode()
        raise OnnxschedError(f"cuDNN reports {text.removeprefix('CUDNN_STATUS_')}.")


class Descriptor:
    """One of cuDNN's descriptors, destroyed with its last reference."""

    def __init__(self, kind: int, values: Mapping[Attribute, Any] | None = None) -> None:
        """Create it, and set its attributes and finalize it unless cuDNN is to fill it in.

        Args:
            kind: What it describes.
            values: A value, or a sequence of values, for each attribute; None for one that cuDNN
                fills in.

        Raises:
            OnnxschedError: cuDNN does not support that.
        """
        self.native = ctypes.c_void_p()
        self._kept: list[Descriptor] = []
        call("cudnnBackendCreateDescriptor", kind, ctypes.byref(self.native))
        if values is not None:
            for attribute, value in values.items():
                self._set(attribute, list(value) if isinstance(value, Sequence) else [value])
            call("cudnnBackendFinalize", self.native)

    def _set(self, attribute: Attribute, values: list[Any]) -> None:
        number, kind = attribute
        if kind == DESCRIPTOR:
            self._kept += values
            values = [descriptor.native.value for descriptor in values]
        array = (_C_TYPES.get(kind, ctypes.c_int) * len(values))(*values)
        call("cudnnBackendSetAttribute", self.native, number, kind, len(values), array)

    def get(self, attribute: Attribute, most: int) -> list[Any]:
        """The values of an attribute, other than descriptors: no more than `most`."""
        array = (_C_TYPES.get(attribute[1], ctypes.c_int) * most)()
        count = self._fill(attribute, array)
        return list(array)[:count]

    def get_descriptors(self, attribute: Attribute, kind: int, most: int) -> list[Descriptor]:
        """The descriptors of one kind that are an attribute: no more than `most`."""
        made = [Descriptor(kind) for _ in range(most)]
        array = (ctypes.c_void_p * most)(*(descriptor.native.value for descriptor in made))
        count = self._fill(attribute, array)
        return made[:count]

    def _fill(self, attribute: Attribute, array: Any) -> int:
        number, kind = attribute
        found = ctypes.c_int64()
        call(
            "cudnnBackendGetAttribute",
            self.native, number, kind, len(array), ctypes.byref(found), array,
        )  # fmt: skip
        return min(found.value, len(array))

    def __del__(self) -> None:
        if getattr(self, "native", None):
            library().cudnnBackendDestroyDescriptor(self.native)
