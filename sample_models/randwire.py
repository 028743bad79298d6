"""RandWire: Xie et al. 2019, "Exploring Randomly Wired Neural Networks for Image Recognition".

The small regime: three stages of 32 nodes that a Watts-Strogatz graph WS(4, 0.75) wires.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from sample_models.layers import Net
from sample_models.windows import ConvSpec

_NODES = 32
_NEIGHBOURS = 4
_REWIRED = 0.75
_WIRING_SEED = 1
_CHANNELS = 78
_STAGES = {"stage3": _CHANNELS, "stage4": 2 * _CHANNELS, "stage5": 4 * _CHANNELS}

Edge = tuple[int, int]


def randwire(image: int, batch: int) -> onnx.ModelProto:
    """Builds RandWire-WS(4, 0.75) with 78 channels.

    Args:
        image: Height and width of the input.
        batch: Number of images.

    Returns:
        A model from `input` [batch, 3, image, image] to `logits` [batch, 1000].
    """
    net = Net("randwire")
    wiring = np.random.Generator(np.random.PCG64(_WIRING_SEED))
    x = net.input("input", (batch, 3, image, image))
    x = net.conv_bn_relu("stage1", x, ConvSpec(_CHANNELS // 2, 3, 2))
    x = net.conv("stage2/conv", x, ConvSpec(_CHANNELS, 3, 2))
    x = net.batch_norm("stage2/bn", x)
    for stage, channels in _STAGES.items():
        edges = watts_strogatz(_NODES, _NEIGHBOURS, _REWIRED, wiring)
        x = _stage(net, stage, x, edges, channels)
    x = net.relu("head/relu", x)
    x = net.conv_bn_relu("head/conv1x1", x, ConvSpec(1280))
    x = net.global_average_pool("head/avgpool", x)
    return net.model(logits=net.gemm("head/fc", x, 1000))


def watts_strogatz(
    nodes: int, neighbours: int, probability: float, rng: np.random.Generator
) -> list[Edge]:
    """Draws a small-world graph (Watts and Strogatz 1998), directed as RandWire does.

    Args:
        nodes: Number of nodes, around a ring.
        neighbours: Even number of nearest nodes that each node starts out connected to.
        probability: Chance of an edge to be moved to a random end.
        rng: Source of randomness.

    Returns:
        The nodes * neighbours / 2 edges, each from the lower to the higher node, sorted.
    """
    edges: dict[Edge, None] = {}
    for step in range(1, neighbours // 2 + 1):
        for node in range(nodes):
            edges[_edge(node, (node + step) % nodes)] = None
    for step in range(1, neighbours // 2 + 1):
        for node in range(nodes):
            if rng.random() >= probability:
                continue
            free = [other for other in range(nodes) if _is_free(edges, node, other)]
            del edges[_edge(node, (node + step) % nodes)]
            edges[_edge(node, free[rng.integers(len(free))])] = None
    return sorted(edges)


def _edge(one: int, other: int) -> Edge:
    return min(one, other), max(one, other)


def _is_free(edges: dict[Edge, None], node: int, other: int) -> bool:
    return node != other and _edge(node, other) not in edges


def _stage(net: Net, name: str, x: gs.Tensor, edges: list[Edge], channels: int) -> gs.Variable:
    """Runs a wired stage, which halves the image; the ends of the wiring are averaged."""
    results: list[gs.Variable] = []
    for node in range(_NODES):
        sources = [results[source] for source, target in edges if target == node]
        unit = f"{name}/node{node}"
        combined = _weighted_sum(net, unit, sources) if sources else x
        results.append(_unit(net, unit, combined, channels, 1 if sources else 2))
    inner = {source for source, _ in edges}
    ends = [result for node, result in enumerate(results) if node not in inner]
    total = _total(net, f"{name}/output", ends)
    return net.elementwise(f"{name}/output/mean", "Mul", total, 1 / len(ends))


def _weighted_sum(net: Net, name: str, sources: list[gs.Variable]) -> gs.Variable:
    """Sums by learned weights; an exporter folds their sigmoid, so they are in (0, 1)."""
    scaled = []
    for index, source in enumerate(sources):
        weight = net.uniform(f"{name}/edge{index}/weight", (), 0.25, 0.75)
        scaled.append(net.elementwise(f"{name}/edge{index}", "Mul", source, weight))
    return _total(net, name, scaled)


def _total(net: Net, name: str, parts: list[gs.Variable]) -> gs.Variable:
    total = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        total = net.add(f"{name}/add{index}", total, part)
    return total


def _unit(net: Net, name: str, x: gs.Tensor, channels: int, stride: int) -> gs.Variable:
    """A Relu, a separable convolution and a normalisation."""
    x = net.relu(f"{name}/relu", x)
    depthwise = ConvSpec(x.shape[1], 3, stride)
    x = net.conv(f"{name}/depthwise", x, depthwise, groups=x.shape[1])
    x = net.conv(f"{name}/pointwise", x, ConvSpec(channels))
    return net.batch_norm(f"{name}/bn", x)
