"""Pools by cuDNN's old interface, which knows kernels that its graph API does not."""

from __future__ import annotations

import ctypes
from typing import Any

from onnxsched_runtime.cuda import cudnn
from onnxsched_runtime.cuda.binding import current_device
from onnxsched_runtime.cuda.operations import (
    ELEMENT_TYPES,
    Launch,
    Places,
    handle_on,
    strides_of,
    using_handle,
)
from onnxsched_runtime.cuda.streams import Stream
from onnxsched_runtime.device import Device
from onnxsched_runtime.kernels import Pool

_MAXIMUM, _AVERAGE_WITH_PADDING, _AVERAGE = 0, 1, 2
_NOT_A_NUMBER_PASSES = 1


class PlainPool:
    """What cuDNN launches for a pool on a GPU; it lasts as long as the process."""

    workspace_nbytes = 0

    def __init__(self, what: Pool, device: Device) -> None:
        """Describe it.

        Raises:
            OnnxschedError: cuDNN does not support it.
        """
        self.device = device
        self._image = _Described("Tensor")
        self._output = _Described("Tensor")
        self._form = _Described("Pooling")
        for tensor, shape in ((self._image, what.image), (self._output, what.output)):
            kind = ELEMENT_TYPES[what.element_type]
            cudnn.call(
                "cudnnSetTensor4dDescriptorEx", tensor.native, kind, *shape, *strides_of(shape)
            )
        rank = len(what.window)
        numbers = ctypes.c_int * rank
        average = _AVERAGE_WITH_PADDING if what.counts_padding else _AVERAGE
        cudnn.call(
            "cudnnSetPoolingNdDescriptor",
            self._form.native,
            average if what.averages else _MAXIMUM,
            _NOT_A_NUMBER_PASSES,
            rank,
            numbers(*what.window),
            numbers(*what.pads[:rank]),  # behind, an output of a given size shows it
            numbers(*what.strides),
        )

    def bind(self, places: Places) -> Launch:
        """What launches it on fixed addresses; it raises `OnnxschedError` where cuDNN refuses."""
        image, output = ctypes.c_void_p(places.image), ctypes.c_void_p(places.output)
        handle = handle_on(self.device)
        times, kept = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))

        def launch(stream: Stream) -> None:
            described: tuple[Any, ...] = (
                self._form.native, times, self._image.native, image, kept, self._output.native,
                output,
            )  # fmt: skip
            with using_handle, current_device(self.device):
                cudnn.call("cudnnSetStream", handle, stream.handle)
                cudnn.call("cudnnPoolingForward", handle, *described)

        return launch


class _Described:
    """A descriptor of the old interface, destroyed with its last reference."""

    def __init__(self, kind: str) -> None:
        self.native = ctypes.c_void_p()
        self._kind = kind
        cudnn.call(f"cudnnCreate{kind}Descriptor", ctypes.byref(self.native))

    def __del__(self) -> None:
        if getattr(self, "native", None):
            getattr(cudnn.library(), f"cudnnDestroy{self._kind}Descriptor")(self.native)
