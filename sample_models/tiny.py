"""A few kilobytes of convolutions in three branches, committed as `tiny.onnx`.

`python -m sample_models tiny -o sample_models/tiny.onnx` writes that file.
"""

import onnx

from sample_models.layers import Net
from sample_models.windows import ConvSpec

_BRANCHES = {
    "branch1": (ConvSpec(4),),
    "branch2": (ConvSpec(4), ConvSpec(6, 3)),
    "branch3": (ConvSpec(4), ConvSpec(4, 3), ConvSpec(6, 3)),
}


def tiny(image: int, batch: int) -> onnx.ModelProto:
    """Builds the tiny model.

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 10].
    """
    net = Net("tiny")
    x = net.input("input", (batch, 3, image, image))
    x = net.conv_bn_relu("stem", x, ConvSpec(8, 3, 2, 1))
    ends = []
    for branch, chain in _BRANCHES.items():
        end = x
        for index, spec in enumerate(chain, start=1):
            end = net.conv_bn_relu(f"{branch}/conv{index}", end, spec)
        ends.append(end)
    x = net.concat("concat", ends)
    x = net.global_average_pool("avgpool", x)
    return net.model(logits=net.gemm("fc", x, 10))
