"""Fitting the copy of an operator to a band of its image."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from onnxsched.drafting import Draft
from onnxsched.graph_view import GraphView
from onnxsched.rows import HEIGHT_AXIS, crop_axes, explicit_window

_TO_THE_END = 2**31 - 1


def fit(draft: Draft, node: onnx.NodeProto, copy: onnx.NodeProto, pads: tuple[int, int]) -> None:
    """Let the copy of an operator read a band as the operator reads its image, in place.

    Args:
        draft: Gets what has to be stored for that.
        node: An operator with a `row_window` that says more than that rows are alike.
        copy: Its copy for a band, which is given no rows that are to be cropped.
        pads: The rows of padding above and below the band.
    """
    if node.op_type == "Pad":
        copy.input[1] = draft.store(f"{copy.name}/pads", _padded(draft.view, node, pads))
    elif node.op_type == "Slice":
        _leave_rows(draft, node, copy)
    else:
        _set_pads(draft.view, node, copy, pads)


def _padded(view: GraphView, node: onnx.NodeProto, pads: tuple[int, int]) -> np.ndarray:
    """What a Pad adds on each side, with other rows."""
    sides = view.array(node.input[1]).copy()
    sides[[HEIGHT_AXIS, len(sides) // 2 + HEIGHT_AXIS]] = pads
    return sides


def _leave_rows(draft: Draft, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
    """Let a Slice crop everything but rows."""
    starts, ends = (draft.view.array(name).copy() for name in node.input[1:3])
    place = crop_axes(draft.view, node).index(HEIGHT_AXIS)
    starts[place], ends[place] = 0, _TO_THE_END
    copy.input[1] = draft.store(f"{copy.name}/starts", starts)
    copy.input[2] = draft.store(f"{copy.name}/ends", ends)


def _set_pads(
    view: GraphView, node: onnx.NodeProto, copy: onnx.NodeProto, pads: tuple[int, int]
) -> None:
    """Give a convolution or pool explicit padding."""
    window = explicit_window(view, node)
    kept = [a for a in copy.attribute if a.name not in ("auto_pad", "ceil_mode", "pads")]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    begins, ends = (pads[0], *window.begins[1:]), (pads[1], *window.ends[1:])
    copy.attribute.append(helper.make_attribute("pads", [*begins, *ends]))
