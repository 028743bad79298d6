"""GoogLeNet: Szegedy et al. 2014, "Going Deeper with Convolutions", with batch normalisation.

As widely deployed: the auxiliary heads are gone, and 3x3 windows stand in for the 5x5 ones.
"""

import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import Net
from sample_models.windows import ConvSpec

# Table 1 of the paper: channels of the 1x1 branch, of the two branches that reduce before
# their 3x3 windows, and of the pooling branch.
_STAGES: dict[str, dict[str, tuple[int, tuple[int, int], tuple[int, int], int]]] = {
    "3": {
        "a": (64, (96, 128), (16, 32), 32),
        "b": (128, (128, 192), (32, 96), 64),
    },
    "4": {
        "a": (192, (96, 208), (16, 48), 64),
        "b": (160, (112, 224), (24, 64), 64),
        "c": (128, (128, 256), (24, 64), 64),
        "d": (112, (144, 288), (32, 64), 64),
        "e": (256, (160, 320), (32, 128), 128),
    },
    "5": {
        "a": (256, (160, 320), (32, 128), 128),
        "b": (384, (192, 384), (48, 128), 128),
    },
}
_POOL_AFTER = {"3": 3, "4": 2}


def googlenet(image: int, batch: int) -> onnx.ModelProto:
    """Builds GoogLeNet.

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    net = Net("googlenet")
    x = net.input("input", (batch, 3, image, image))
    x = net.conv_bn_relu("conv1", x, ConvSpec(64, 7, 2, 3))
    x = net.max_pool("maxpool1", x, 3, 2, round_up=True)
    x = net.conv_bn_relu("conv2", x, ConvSpec(64))
    x = net.conv_bn_relu("conv3", x, ConvSpec(192, 3))
    x = net.max_pool("maxpool2", x, 3, 2, round_up=True)
    for stage, blocks in _STAGES.items():
        for block, channels in blocks.items():
            x = _inception(net, f"inception{stage}{block}", x, *channels)
        if stage in _POOL_AFTER:
            x = net.max_pool(f"maxpool{stage}", x, _POOL_AFTER[stage], 2, round_up=True)
    x = net.global_average_pool("avgpool", x)
    return net.model(logits=net.gemm("fc", x, 1000))


def _inception(
    net: Net,
    name: str,
    x: gs.Tensor,
    single: int,
    double: tuple[int, int],
    wide: tuple[int, int],
    pooled: int,
) -> gs.Variable:
    branches = [net.conv_bn_relu(f"{name}/branch1/conv1", x, ConvSpec(single))]
    for index, (reduced, channels) in enumerate((double, wide), start=2):
        branch = net.conv_bn_relu(f"{name}/branch{index}/conv1", x, ConvSpec(reduced))
        branches.append(
            net.conv_bn_relu(f"{name}/branch{index}/conv2", branch, ConvSpec(channels, 3))
        )
    branch = net.max_pool(f"{name}/branch4/pool", x, 3, 1, 1, round_up=True)
    branches.append(net.conv_bn_relu(f"{name}/branch4/conv1", branch, ConvSpec(pooled)))
    return net.concat(f"{name}/concat", branches)
