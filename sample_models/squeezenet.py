"""SqueezeNet 1.1: Iandola et al. 2016, "SqueezeNet", with the pooling moved forward."""

import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import Net
from sample_models.windows import ConvSpec

# Channels of the squeezing convolution and of each of the two expanding ones.
_FIRES: dict[str, tuple[int, int]] = {
    "fire2": (16, 64),
    "fire3": (16, 64),
    "fire4": (32, 128),
    "fire5": (32, 128),
    "fire6": (48, 192),
    "fire7": (48, 192),
    "fire8": (64, 256),
    "fire9": (64, 256),
}
_POOL_AFTER = {"fire3": "maxpool3", "fire5": "maxpool5"}


def squeezenet(image: int, batch: int) -> onnx.ModelProto:
    """Builds SqueezeNet 1.1.

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    net = Net("squeezenet")
    x = net.input("input", (batch, 3, image, image))
    x = _conv_relu(net, "conv1", x, ConvSpec(64, 3, 2, 0))
    x = net.max_pool("maxpool1", x, 3, 2, round_up=True)
    for name, (squeezed, expanded) in _FIRES.items():
        x = _conv_relu(net, f"{name}/squeeze", x, ConvSpec(squeezed))
        halves = [
            _conv_relu(net, f"{name}/expand1x1", x, ConvSpec(expanded)),
            _conv_relu(net, f"{name}/expand3x3", x, ConvSpec(expanded, 3)),
        ]
        x = net.concat(f"{name}/concat", halves)
        if name in _POOL_AFTER:
            x = net.max_pool(_POOL_AFTER[name], x, 3, 2, round_up=True)
    x = _conv_relu(net, "conv10", x, ConvSpec(1000))
    return net.model(logits=net.global_average_pool("avgpool", x))


def _conv_relu(net: Net, name: str, x: gs.Tensor, spec: ConvSpec) -> gs.Variable:
    x = net.conv(f"{name}/conv", x, spec, bias=True)
    return net.relu(f"{name}/relu", x)
