from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import sample_models


@functools.cache
def _has_gpu() -> bool:
    if importlib.util.find_spec("cuda") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not _has_gpu():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _full_workspace() -> None:
    """Let cuBLAS keep what matrix products want, whichever test comes first."""
    if _has_gpu():
        from onnxsched_runtime.session import load_cuda_libraries

        load_cuda_libraries()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Paths of models of the zoo, each built once."""
    folder = tmp_path_factory.mktemp("zoo")

    @functools.cache
    def path(name: str) -> Path:
        target = folder / f"{name}.onnx"
        onnx.save(sample_models.build(name), target)
        return target

    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of measurements for all tests."""
    return tmp_path_factory.mktemp("cache")
