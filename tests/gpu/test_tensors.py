"""GPU tensors go in and come out without a host copy, ordered by the caller's stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import onnxsched
import sample_models
from onnxsched_runtime.files import write_model


@pytest.fixture(scope="module")
def session(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[onnxsched.Session]:
    folder = tmp_path_factory.mktemp("tensors")
    write_model(sample_models.build("squeezenet"), folder / "in.onnx")
    onnxsched.optimize(
        folder / "in.onnx", folder / "out.onnx", policy="opara", cache_dir=cache_dir, budget_s=4.0
    )
    with onnxsched.load(folder / "out.onnx") as loaded:
        yield loaded


def _image(seed: int) -> np.ndarray:
    shape = (1, 3, 224, 224)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_gpu_tensors_give_gpu_tensors_with_the_same_values(session: onnxsched.Session) -> None:
    import torch

    for seed in range(20):
        (expected,) = session.run(None, {"input": _image(seed)})
        output = session(torch.from_numpy(_image(seed)).cuda())
        assert isinstance(output, torch.Tensor)
        assert output.is_cuda
        np.testing.assert_array_equal(output.cpu().numpy(), expected)


def test_earlier_outputs_are_not_overwritten_by_later_runs(session: onnxsched.Session) -> None:
    import torch

    images = [_image(seed) for seed in range(8)]
    outputs = [session(torch.from_numpy(image).cuda()) for image in images]
    for image, output in zip(images, outputs, strict=True):
        np.testing.assert_array_equal(output.cpu().numpy(), session.run(None, {"input": image})[0])


def test_runs_are_ordered_by_the_callers_stream(session: onnxsched.Session) -> None:
    import torch

    (expected,) = session.run(None, {"input": 2 * _image(5)})
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    image = torch.from_numpy(_image(5)).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
            fed = image * 2
            output = session(fed) + 0
            del fed
            np.testing.assert_array_equal(output.cpu().numpy(), expected)


def test_any_dlpack_object_goes_in(session: onnxsched.Session) -> None:
    import torch

    class OnlyDlpack:
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor
            self.shape = tensor.shape

        def __dlpack__(self, **options: object) -> object:
            return self._tensor.__dlpack__(**options)  # type: ignore[arg-type]

        def __dlpack_device__(self) -> object:
            return self._tensor.__dlpack_device__()

    (expected,) = session.run(None, {"input": _image(9)})
    output = session(OnlyDlpack(torch.from_numpy(_image(9)).cuda()))
    np.testing.assert_array_equal(output.cpu().numpy(), expected)


def test_a_gpu_tensor_of_another_shape_or_type_is_refused(session: onnxsched.Session) -> None:
    import torch

    with pytest.raises(onnxsched.OnnxschedError, match="shape"):
        session(torch.zeros((1, 3, 8, 8), device="cuda"))
    with pytest.raises(onnxsched.OnnxschedError, match="float"):
        session(torch.zeros((1, 3, 224, 224), dtype=torch.float16, device="cuda"))


@pytest.mark.alone
def test_closing_gives_the_memory_back(tmp_path: Path, cache_dir: Path) -> None:
    import torch

    write_model(sample_models.build("googlenet"), tmp_path / "in.onnx")
    onnxsched.optimize(
        tmp_path / "in.onnx", tmp_path / "out.onnx", cache_dir=cache_dir, budget_s=4.0
    )

    def used_mebibytes() -> float:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20

    levels = []
    for _ in range(4):
        with onnxsched.load(tmp_path / "out.onnx") as session:
            session.run(None, {"input": _image(0)})
        levels.append(used_mebibytes())
    assert levels[-1] - levels[0] < 64
