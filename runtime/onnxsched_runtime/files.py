"""Models and results as files: read, written whole or not at all, or passed on for a while."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnxsched_runtime.errors import ModelError, OnnxschedError, UsageError, absent

_FILE_NBYTES = 2**31 - 2**20
"""Models above this are written with their weights in a file of their own."""


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model and its external data.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no ONNX model, or its external data is missing.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise UsageError(f"{absent(file)}; give the path of an ONNX model.")
    try:
        model = onnx.load(file, format="protobuf")
    except DecodeError as error:
        raise ModelError(f"'{file}' can't be read as an ONNX model ({error}).") from error
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        missing = sorted(path for path in _weight_files(file) if not os.path.exists(path))
        reason = f"'{missing[0]}' is missing" if missing else str(error).rstrip(".")
        raise ModelError(
            f"The weights beside '{file}' can't be read ({reason}); put the files back that were "
            "exported with it."
        ) from error
    if not model.graph.node:
        raise ModelError(f"'{file}' holds no operators; export the model again.")
    if not model.graph.output:
        raise ModelError(f"'{file}' has no outputs, so it computes nothing; export it with some.")
    return model


def require_target(
    option: str,
    target: str | os.PathLike[str] | None,
    *others: str | os.PathLike[str] | None,
    models: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Check before the work starts that a file can be written, and takes the place of no other.

    Links are followed, as they are when it is written.

    Args:
        option: What it is given with.
        target: The file; None is fine.
        others: What the command reads or writes besides.
        models: Models that it reads, whose weights may lie in files of their own.

    Raises:
        UsageError: Its folder is not there, it is a folder itself, or one of the others, or it
            holds a model's weights.
        OnnxschedError: It can't be written.
    """
    if target is None:
        return
    path = os.path.realpath(target)
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise UsageError(f"There is no folder '{folder}' for {option}; make it first.")
    if os.path.isdir(path):
        raise UsageError(f"{option} '{target}' is a folder; give the path of a file to write.")
    taken = {os.path.realpath(other) for other in others if other is not None}
    sources = [os.fspath(model) for model in models if model is not None]
    beside = _weights_beside(path)
    weights: set[str] = set()
    if os.path.exists(path) or os.path.exists(beside):  # else models need not be read for it
        weights = {file for source in sources for file in _weight_files(source)}
    if path in taken | weights:
        raise UsageError(
            f"{option} '{target}' is a file that this command reads or writes, too; give another."
        )
    is_large = sum(map(os.path.getsize, filter(os.path.isfile, weights))) > _FILE_NBYTES // 2
    if beside in weights and is_large and path not in map(os.path.realpath, sources):
        raise UsageError(
            f"{option} '{target}' would lie beside '{beside}', which holds weights that this "
            "command reads, and may need a file of that name for its own; give another."
        )
    with _draft_of(target):
        pass


def _weight_files(path: str | os.PathLike[str]) -> set[str]:
    """The files beside a model that hold its weights; none where it can't be read."""
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, OSError):
        return set()
    folder = os.path.dirname(path)
    graphs = [model.graph, *(onnx.GraphProto(node=function.node) for function in model.functions)]
    return {
        os.path.realpath(os.path.join(folder, entry.value))
        for graph in graphs
        for tensor in _stored(graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Weights and constants, those of subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for body in (attribute.g, *attribute.graphs):
                yield from _stored(body)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft to write to, which takes the place of `path` only if all goes well.

    Links are followed; what is there and no regular file is never replaced.

    Raises:
        OnnxschedError: The file can't be written.
    """
    with _draft_of(path) as draft:
        yield draft
        target = os.path.realpath(path)
        with suppress(FileNotFoundError):  # who may read what it replaces may read it
            shutil.copymode(target, draft)
        os.replace(draft, target)


@contextmanager
def _draft_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to be, in a folder of its own beside `path`, both gone at the end."""
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise OnnxschedError(f"'{path}' can't be written (it is no regular file); choose another.")
    try:
        with suppress(FileNotFoundError):
            os.lstat(target)  # which a name too long for any file fails at
        with tempfile.TemporaryDirectory(prefix=".onnxsched-", dir=target.parent) as scratch:
            yield Path(scratch) / target.name
    except OSError as error:
        reason = error.strerror or error
        raise OnnxschedError(f"'{path}' can't be written ({reason}); choose another.") from error


def write_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model whole or not at all; weights go to `PATH.data` above 2 GiB.

    Raises:
        OnnxschedError: The file can't be written.
    """
    content = serialized(model)
    with written_whole(path) as draft:
        if content is not None:
            draft.write_bytes(content)
        else:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            beside = _weights_beside(str(draft))
            onnx.save(copy, draft, save_as_external_data=True, location=os.path.basename(beside))
            os.replace(beside, _weights_beside(os.path.realpath(path)))


def _weights_beside(path: str) -> str:
    """The file that holds the weights of a model too large for one."""
    return f"{path}.data"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, gone afterwards; one without room for a model is called that.

    Raises:
        OnnxschedError: There is no temporary folder, or no room in it.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="onnxsched-")
    except OSError as error:
        raise OnnxschedError(
            f"No temporary folder can be made ({error.strerror}); free some room, or set TMPDIR."
        ) from error
    with made as name:
        try:
            yield Path(name)
        except OnnxschedError as error:
            if is_full(error.__cause__):
                raise _no_room(Path(name)) from error
            raise


@contextmanager
def saved_by_ort(folder: Path) -> Iterator[None]:
    """Let ORT save a model in a scratch folder; it blames the model if there is no room.

    Raises:
        OnnxschedError: There is no room for as much again as lies there.
    """
    try:
        yield
    except ModelError as error:
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        if shutil.disk_usage(folder).free <= nbytes:
            raise _no_room(folder) from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _no_room(scratch: Path) -> OnnxschedError:
    return OnnxschedError(
        f"There is no room in the temporary folder '{scratch.parent}'; free some or set TMPDIR."
    )


def serialized(model: onnx.ModelProto) -> bytes | None:
    """A model as one file holds it; None above 2 GiB, which protobuf does not write.

    To ask for its size first would take as long again: protobuf serializes it for that.
    """
    try:
        content: bytes = model.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return content if len(content) < _FILE_NBYTES else None
