"""Variants: how the sessions of one and the same model execute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Layout = Literal["nchw", "nhwc"]
ConvSearch = Literal["exhaustive", "heuristic"]


@dataclass(frozen=True, slots=True)
class Variant:
    """What changes kernels and not results: settings of ONNX Runtime's CUDA provider, above all.

    The annotated file is the same for all of them; sessions are made so when it is loaded.
    """

    layout: Layout = "nchw"
    """Of images between operators. For `nhwc` ORT lowers the whole model before it is cut."""
    fuse_conv_bias: bool = False
    """Let cuDNN add the bias inside a convolution. Some ORT releases compute garbage so."""
    conv_search: ConvSearch = "exhaustive"
    """Which of cuDNN's heuristics proposes the kernels of a convolution."""
    fuses: bool = False
    """Launch convolutions through cuDNN, with bias, sum and Relu in the same kernel: what sessions
    leave in several. Only for `nhwc`."""
    tf32: bool = True
    """Allow products of float32 with 10 bits of mantissa, as ORT does by default."""

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Read what `to_json` wrote; missing fields have their defaults, unknown ones are ignored.

        Raises:
            ValueError: It is no object, or a field has a value of another kind.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{content!r} is no variant")
        given = {f.name: content[f.name] for f in dataclasses.fields(cls) if f.name in content}
        variant = cls(**given)
        if (
            variant.layout not in get_args(Layout)
            or variant.conv_search not in get_args(ConvSearch)
            or not isinstance(variant.fuse_conv_bias, bool)
            or not isinstance(variant.fuses, bool)
            or not isinstance(variant.tf32, bool)
        ):
            raise ValueError(f"{dict(content)} is no variant")
        return variant

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """E.g. `nhwc+bias`."""
        marks = [
            (self.fuse_conv_bias, "+bias"),
            (self.fuses, "+fused"),
            (self.conv_search != "exhaustive", f"+{self.conv_search}"),
            (not self.tf32, "-tf32"),
        ]
        return self.layout + "".join(mark for holds, mark in marks if holds)


DEFAULT_VARIANT = Variant()
"""What ORT does by itself."""
