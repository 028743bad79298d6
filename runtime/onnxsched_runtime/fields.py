"""Fields of the schedule in a model, read with distrust: people and other tools edit them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from onnx import TensorProto

from onnxsched_runtime.errors import AnnotationError, UsageError
from onnxsched_runtime.tensor import fits_no_memory

_Read = TypeVar("_Read")

_DAMAGE = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    UsageError,
)  # fmt: skip
"""What reading a damaged schedule can raise."""


def json_object(text: str) -> dict[str, Any]:
    """The table of a schedule.

    Raises:
        AnnotationError: It is no JSON object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged("it is no JSON") from error
    if not isinstance(content, dict):
        raise damaged("it is no JSON object")
    return content


def read_field(
    content: Mapping[str, Any], name: str, read: Callable[[Any], _Read], default: Any = None
) -> _Read:
    """A field of the table, or what is read of its default.

    Raises:
        AnnotationError: It is missing, though it has no default, or holds something else.
    """
    if name not in content and default is None:
        raise damaged(f"field '{name}' is missing")
    try:
        return read(content.get(name, default))
    except _DAMAGE as error:
        raise damaged(f"field '{name}' is not as onnxsched writes it") from error


def damaged(reason: str) -> AnnotationError:
    """What to say of a schedule that someone has written something else into, for a reason."""
    return AnnotationError(
        f"The schedule of the model is damaged ({reason}); run `onnxsched optimize` again."
    )


def read_size(value: Any) -> int:
    """A number from 0.

    Raises:
        ValueError: It is something else; the message is a clause that says so.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"'{value}' is no number from 0")
    return value


def read_number(text: str) -> int:
    """A number from 0, written out.

    Raises:
        ValueError: As `read_size`.
    """
    if not re.fullmatch("[0-9]{1,19}", text):
        raise ValueError(f"'{text}' is no number from 0")
    return read_size(int(text))


def read_shape(sizes: Any) -> tuple[int, ...]:
    """A shape.

    Raises:
        ValueError: It is none, or that of a tensor larger than any memory.
    """
    if not isinstance(sizes, list):
        raise ValueError(f"{sizes!r} is no shape")
    shape = tuple(map(read_size, sizes))
    if fits_no_memory(shape):
        raise ValueError(f"{sizes!r} is larger than any memory")
    return shape


def read_element_type(value: Any) -> int:
    """An element type of ONNX's.

    Raises:
        ValueError: It is none.
    """
    if not read_size(value) or value not in TensorProto.DataType.values():
        raise ValueError(f"{value!r} is no element type")
    return read_size(value)
