"""Every kernel that cuDNN proposes for a pool computes what the pool is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxsched_runtime import cuda
from onnxsched_runtime.cuda.fused_kernels import build_kernel, propose_kernels
from onnxsched_runtime.device import Device
from onnxsched_runtime.errors import OnnxschedError
from onnxsched_runtime.kernels import PLAIN, Pool
from onnxsched_runtime.session import load_cuda_libraries
from onnxsched_runtime.tensor import TensorType
from support.fused import pooled_windows

_CUDA = Device("cuda")
_FORMS = [
    # image, window, strides, pads
    ((2, 8, 9, 7), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 64, 28, 28), (3, 3), (2, 2), (0, 0, 0, 0)),
    ((3, 20, 12, 17), (2, 3), (2, 1), (0, 1, 0, 1)),
    ((1, 12, 13, 13), (5, 5), (1, 1), (2, 2, 2, 2)),
]
_NEAR: dict[int, float] = {TensorProto.FLOAT: 1e-6, TensorProto.FLOAT16: 2e-3}


def _pool(
    form: tuple[tuple[int, ...], ...], element_type: int, *, averages: bool, counts_padding: bool
) -> Pool:
    image, window, strides, pads = form
    sizes = [
        (size + pads[axis] + pads[axis + 2] - window[axis]) // strides[axis] + 1
        for axis, size in enumerate(image[2:])
    ]
    output = (*image[:2], *sizes)
    return Pool(element_type, image, output, window, strides, pads, averages, counts_padding)


def _computed(what: Pool, kernel: tuple[tuple[int, ...], ...], image: np.ndarray) -> np.ndarray:
    built = build_kernel(what, kernel, _CUDA)
    images, channels, height, width = what.output
    result = TensorType(what.element_type, (images, height, width, channels))
    read = TensorType(what.element_type, image.shape)
    with (
        cuda.DeviceMemory(read.nbytes, _CUDA) as source,
        cuda.DeviceMemory(result.nbytes, _CUDA) as target,
        cuda.DeviceMemory(built.workspace_nbytes, _CUDA) as workspace,
        cuda.Stream(_CUDA) as stream,
    ):
        source.upload(image, 0)
        places = cuda.Places(source.pointer, None, target.pointer, None, None, workspace.pointer)
        built.bind(places)(stream)
        buffer = cuda.Buffer(result, _CUDA, target.pointer)
        buffer.fetch(stream)
        stream.synchronize()
        return buffer.staging.copy()


@pytest.mark.parametrize("element_type", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize(
    ("averages", "counts_padding"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("form", _FORMS, ids=str)
def test_every_kernel_computes_the_pool(
    form: tuple[tuple[int, ...], ...], averages: bool, counts_padding: bool, element_type: int
) -> None:
    load_cuda_libraries()
    what = _pool(form, element_type, averages=averages, counts_padding=counts_padding)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element_type)
    drawn = np.random.default_rng(0).standard_normal(what.image).astype(dtype)
    image = np.ascontiguousarray(np.moveaxis(drawn, 1, -1))
    expected = pooled_windows(
        image, what.window, what.strides, what.pads,
        averages=averages, counts_padding=counts_padding,
    )  # fmt: skip
    kernels = propose_kernels(what, _CUDA)
    assert kernels[0] == PLAIN
    supported = []
    for kernel in kernels:
        try:
            actual = _computed(what, kernel, image)
        except OnnxschedError:
            assert kernel != PLAIN
            continue
        supported.append(kernel)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=_NEAR[element_type] * 4)
    assert len(supported) > 1
