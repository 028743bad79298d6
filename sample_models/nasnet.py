"""NASNet-A: Zoph et al. 2017, "Learning Transferable Architectures".

The large and the mobile variant as in Keras, without the auxiliary head.
"""

from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import Net
from sample_models.windows import ConvSpec, Pads

_Arm = tuple[str, str]  # an operation and what it is applied to
_Blocks = dict[str, tuple[_Arm, _Arm]]

# Figure 4 of the paper: each block adds its two arms. `h` is the squeezed output of the cell
# before, `p` that of the cell before it, `padded` is `h` inside a border of zeros.
_NORMAL: _Blocks = {
    "x1": (("sep5", "h"), ("sep3", "p")),
    "x2": (("sep5", "p"), ("sep3", "p")),
    "x3": (("average", "h"), ("identity", "p")),
    "x4": (("average", "p"), ("average", "p")),
    "x5": (("sep3", "h"), ("identity", "h")),
}
_NORMAL_JOIN = ("p", "x1", "x2", "x3", "x4", "x5")
_REDUCTION: _Blocks = {
    "x1": (("sep5", "h"), ("sep7", "p")),
    "x2": (("max", "padded"), ("sep7", "p")),
    "x3": (("average", "padded"), ("sep5", "p")),
    "x4": (("identity", "x2"), ("average", "x1")),
    "x5": (("sep3", "x1"), ("max", "padded")),
}
_REDUCTION_JOIN = ("x2", "x3", "x4", "x5")
_CROP = {"starts": [1, 1], "ends": [2**31 - 1, 2**31 - 1], "axes": [2, 3]}


@dataclass(frozen=True)
class _Variant:
    """What tells the variants apart.

    Attributes:
        name: Name of the model.
        stem: Channels of the first convolution.
        cells: Normal cells between two reductions.
        channels: Channels of each block in the first of the three runs of normal cells.
        skip_reduction: Whether the cell after a reduction looks past it to the cell before,
            rather than at the reduction's own input.
    """

    name: str
    stem: int
    cells: int
    channels: int
    skip_reduction: bool


_LARGE = _Variant("nasnet_large", stem=96, cells=6, channels=168, skip_reduction=True)
_MOBILE = _Variant("nasnet_mobile", stem=32, cells=4, channels=44, skip_reduction=False)


def nasnet_large(image: int, batch: int) -> onnx.ModelProto:
    """Builds NASNet-A (6 @ 4032).

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    return _nasnet(_LARGE, image, batch)


def nasnet_mobile(image: int, batch: int) -> onnx.ModelProto:
    """Builds NASNet-A (4 @ 1056).

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    return _nasnet(_MOBILE, image, batch)


def _nasnet(variant: _Variant, image: int, batch: int) -> onnx.ModelProto:
    net = Net(variant.name)
    x = net.input("input", (batch, 3, image, image))
    x = net.conv("stem/conv", x, ConvSpec(variant.stem, 3, 2, 0))
    x = before = net.batch_norm("stem/bn", x)
    for cell, divisor in (("stem1", 4), ("stem2", 2)):
        x, before = _reduction(net, cell, x, before, variant.channels // divisor), x
    for run in range(3):
        channels = variant.channels << run
        if run:
            reduced = _reduction(net, f"reduction{run}", x, before, channels)
            x, before = reduced, before if variant.skip_reduction else x
        for index in range(variant.cells):
            name = f"normal{run * variant.cells + index}"
            x, before = _normal(net, name, x, before, channels), x
    x = net.relu("relu", x)
    x = net.global_average_pool("avgpool", x)
    return net.model(logits=net.gemm("fc", x, 1000))


def _normal(net: Net, name: str, x: gs.Tensor, before: gs.Tensor, channels: int) -> gs.Variable:
    p = _adjust(net, f"{name}/adjust", before, x, channels)
    h = _squeeze(net, f"{name}/squeeze", x, channels)
    return _cell(net, name, {"h": h, "p": p}, _NORMAL, _NORMAL_JOIN, 1)


def _reduction(net: Net, name: str, x: gs.Tensor, before: gs.Tensor, channels: int) -> gs.Variable:
    p = _adjust(net, f"{name}/adjust", before, x, channels)
    h = _squeeze(net, f"{name}/squeeze", x, channels)
    padded = _zero_pad(net, f"{name}/pad", h, _halving_pads(h.shape[2], 3))
    tensors = {"h": h, "p": p, "padded": padded}
    return _cell(net, name, tensors, _REDUCTION, _REDUCTION_JOIN, 2)


def _cell(
    net: Net,
    name: str,
    tensors: dict[str, gs.Tensor],
    blocks: _Blocks,
    join: tuple[str, ...],
    stride: int,
) -> gs.Variable:
    """Adds up the blocks; the stride is for arms on the cell's inputs, not on other blocks."""
    inputs = frozenset(tensors)
    for block, arms in blocks.items():
        left, right = (
            _arm(
                net,
                f"{name}/{block}/{side}",
                operation,
                tensors[operand],
                tensors["h"].shape[1],
                stride if operand in inputs else 1,
            )
            for side, (operation, operand) in zip(("left", "right"), arms, strict=True)
        )
        tensors[block] = net.add(f"{name}/{block}/add", left, right)
    return net.concat(f"{name}/concat", [tensors[block] for block in join])


def _arm(
    net: Net, name: str, operation: str, x: gs.Tensor, channels: int, stride: int
) -> gs.Tensor:
    match operation:
        case "identity":
            return x
        case "max":
            return net.max_pool(f"{name}/pool", x, 3, stride)
        case "average":
            return net.average_pool(f"{name}/pool", x, 3, stride, 1 if stride == 1 else 0)
        case _:
            return _separable(net, name, x, channels, int(operation[3:]), stride)


def _separable(
    net: Net, name: str, x: gs.Tensor, channels: int, kernel: int, stride: int
) -> gs.Tensor:
    """A separable convolution applied twice; the stride belongs to the first."""
    for index, step in enumerate((stride, 1), start=1):
        stack = f"{name}/stack{index}"
        pads = _halving_pads(x.shape[2], kernel) if step == 2 else None
        x = net.relu(f"{stack}/relu", x)
        depthwise = ConvSpec(x.shape[1], kernel, step, pads)
        x = net.conv(f"{stack}/depthwise", x, depthwise, groups=x.shape[1])
        x = net.conv(f"{stack}/pointwise", x, ConvSpec(channels), gain=1.0)
        x = net.batch_norm(f"{stack}/bn", x)
    return x


def _squeeze(net: Net, name: str, x: gs.Tensor, channels: int) -> gs.Variable:
    # The gain is 1 in spite of the Relu: a cell adds two arms, which doubles the variance.
    x = net.relu(f"{name}/relu", x)
    x = net.conv(f"{name}/conv", x, ConvSpec(channels), gain=1.0)
    return net.batch_norm(f"{name}/bn", x)


def _adjust(net: Net, name: str, before: gs.Tensor, x: gs.Tensor, channels: int) -> gs.Tensor:
    """Brings the output of the cell before last to the image size of x and to `channels`."""
    if before is x:  # the first cell has only the stem before it
        return x
    if before.shape[2] != x.shape[2]:
        return _halve(net, name, before, channels)
    if before.shape[1] != channels:
        return _squeeze(net, name, before, channels)
    return before


def _halve(net: Net, name: str, x: gs.Tensor, channels: int) -> gs.Variable:
    """Takes every second pixel twice, the second time one pixel further down and right."""
    x = net.relu(f"{name}/relu", x)
    padded = _zero_pad(net, f"{name}/path2/pad", x, (0, 0, 1, 1))
    ends = [net.constant(f"{name}/path2/crop/{end}", values) for end, values in _CROP.items()]
    moved = net.op(f"{name}/path2/crop", "Slice", [padded, *ends], x.shape)
    paths = []
    for path, start in (("path1", x), ("path2", moved)):
        pixels = net.average_pool(f"{name}/{path}/pool", start, 1, 2)
        paths.append(net.conv(f"{name}/{path}/conv", pixels, ConvSpec(channels // 2), gain=1.0))
    return net.batch_norm(f"{name}/bn", net.concat(f"{name}/concat", paths))


def _zero_pad(net: Net, name: str, x: gs.Tensor, pads: Pads) -> gs.Variable:
    top, left, bottom, right = pads
    batch, channels, height, width = x.shape
    amounts = net.constant(f"{name}/pads", [0, 0, top, left, 0, 0, bottom, right])
    shape = (batch, channels, height + top + bottom, width + left + right)
    return net.op(name, "Pad", [x, amounts], shape, mode="constant")


def _halving_pads(size: int, kernel: int) -> Pads:
    """Padding with which a window of stride 2 halves an image, its size rounded up."""
    after = kernel // 2
    before = after - (size + 1) % 2
    return before, before, after, after
