"""Inception-v3: Szegedy et al. 2015, "Rethinking the Inception Architecture".

As widely deployed: the auxiliary head is gone.
"""

import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import Net
from sample_models.windows import ConvSpec

_Chain = tuple[ConvSpec, ...]
_Branches = dict[str, _Chain]


def _factored(channels: int, last: int, kernels: str) -> _Chain:
    """A chain of 1x7 ("-") and 7x1 ("|") windows; the last one has its own channels."""
    shapes = [(1, 7) if kernel == "-" else (7, 1) for kernel in kernels]
    inner = tuple(ConvSpec(channels, shape) for shape in shapes[:-1])
    return (ConvSpec(channels), *inner, ConvSpec(last, shapes[-1]))


def _block_35(pooled: int) -> _Branches:
    """Figure 5 of the paper: two 3x3 windows replace a 5x5 one."""
    return {
        "branch1x1": (ConvSpec(64),),
        "branch5x5": (ConvSpec(48), ConvSpec(64, 5)),
        "branch3x3dbl": (ConvSpec(64), ConvSpec(96, 3), ConvSpec(96, 3)),
        "branch_pool": (ConvSpec(pooled),),
    }


def _block_17(channels: int) -> _Branches:
    """Figure 6 of the paper: 7x7 windows factored into 1x7 and 7x1."""
    return {
        "branch1x1": (ConvSpec(192),),
        "branch7x7": _factored(channels, 192, "-|"),
        "branch7x7dbl": _factored(channels, 192, "|-|-"),
        "branch_pool": (ConvSpec(192),),
    }


_STEM = {
    "conv1a": ConvSpec(32, 3, 2, 0),
    "conv2a": ConvSpec(32, 3, 1, 0),
    "conv2b": ConvSpec(64, 3),
    "maxpool1": None,
    "conv3b": ConvSpec(80),
    "conv4a": ConvSpec(192, 3, 1, 0),
    "maxpool2": None,
}
_BLOCKS_35 = {"5b": 32, "5c": 64, "5d": 64}
_REDUCTION_6A: _Branches = {
    "branch3x3": (ConvSpec(384, 3, 2, 0),),
    "branch3x3dbl": (ConvSpec(64), ConvSpec(96, 3), ConvSpec(96, 3, 2, 0)),
    "branch_pool": (),
}
_BLOCKS_17 = {"6b": 128, "6c": 160, "6d": 160, "6e": 192}
_REDUCTION_7A: _Branches = {
    "branch3x3": (ConvSpec(192), ConvSpec(320, 3, 2, 0)),
    "branch7x7x3": (*_factored(192, 192, "-|"), ConvSpec(192, 3, 2, 0)),
    "branch_pool": (),
}
_BLOCKS_8 = ("7b", "7c")


def inception_v3(image: int, batch: int) -> onnx.ModelProto:
    """Builds Inception-v3.

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    net = Net("inception_v3")
    x = net.input("input", (batch, 3, image, image))
    for name, spec in _STEM.items():
        x = net.conv_bn_relu(name, x, spec) if spec else net.max_pool(name, x, 3, 2)
    for name, pooled in _BLOCKS_35.items():
        x = _mixed(net, f"mixed{name}", x, _block_35(pooled))
    x = _mixed(net, "mixed6a", x, _REDUCTION_6A)
    for name, channels in _BLOCKS_17.items():
        x = _mixed(net, f"mixed{name}", x, _block_17(channels))
    x = _mixed(net, "mixed7a", x, _REDUCTION_7A)
    for name in _BLOCKS_8:
        x = _mixed_8(net, f"mixed{name}", x)
    x = net.global_average_pool("avgpool", x)
    return net.model(logits=net.gemm("fc", x, 1000))


def _mixed(net: Net, name: str, x: gs.Tensor, branches: _Branches) -> gs.Variable:
    """Joins branches; a pooling branch without convolutions halves the image."""
    ends = []
    for branch, chain in branches.items():
        start = x
        if branch == "branch_pool":
            start = _average(net, f"{name}/{branch}", x) if chain else _maximum(net, name, x)
        ends.append(_chain(net, f"{name}/{branch}", start, chain))
    return net.concat(f"{name}/concat", ends)


def _mixed_8(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    """Figure 7 of the paper: the last windows of two branches are side by side."""
    ends = [_chain(net, f"{name}/branch1x1", x, (ConvSpec(320),))]
    trunks = {
        "branch3x3": (ConvSpec(384),),
        "branch3x3dbl": (ConvSpec(448), ConvSpec(384, 3)),
    }
    for branch, chain in trunks.items():
        trunk = _chain(net, f"{name}/{branch}", x, chain)
        halves = [
            net.conv_bn_relu(f"{name}/{branch}/{side}", trunk, ConvSpec(384, kernel))
            for side, kernel in (("conv1x3", (1, 3)), ("conv3x1", (3, 1)))
        ]
        ends.append(net.concat(f"{name}/{branch}/concat", halves))
    pooled = _average(net, f"{name}/branch_pool", x)
    ends.append(_chain(net, f"{name}/branch_pool", pooled, (ConvSpec(192),)))
    return net.concat(f"{name}/concat", ends)


def _chain(net: Net, name: str, x: gs.Tensor, chain: _Chain) -> gs.Tensor:
    for index, spec in enumerate(chain, start=1):
        x = net.conv_bn_relu(f"{name}/conv{index}", x, spec)
    return x


def _average(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    return net.average_pool(f"{name}/pool", x, 3, 1, 1, count_pad=True)


def _maximum(net: Net, name: str, x: gs.Tensor) -> gs.Variable:
    return net.max_pool(f"{name}/branch_pool/pool", x, 3, 2)
