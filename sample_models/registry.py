"""The list of the sample models, and the way to build one by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx

from sample_models.bert import bert
from sample_models.deepfm import deepfm
from sample_models.errors import ModelError
from sample_models.googlenet import googlenet
from sample_models.inception_v3 import inception_v3
from sample_models.nasnet import nasnet_large, nasnet_mobile
from sample_models.randwire import randwire
from sample_models.squeezenet import squeezenet
from sample_models.t5 import t5_decoder, t5_encoder
from sample_models.tiny import tiny


@dataclass(frozen=True)
class SampleModel:
    """A model of the zoo.

    Attributes:
        name: What the command line calls it.
        description: One line about it.
        build: Builds it, given `batch` and those of `image` and `sequence` that it has.
        image: Height and width of its images by default, or None for no images.
        sequence: Length of its sequences by default, or None for no sequences.
    """

    name: str
    description: str
    build: Callable[..., onnx.ModelProto]
    image: int | None = None
    sequence: int | None = None


_LISTED = (
    SampleModel("googlenet", "GoogLeNet: 9 inception blocks of 4 branches", googlenet, image=224),
    SampleModel("inception_v3", "Inception-v3: 11 mixed blocks", inception_v3, image=299),
    SampleModel("squeezenet", "SqueezeNet 1.1: 8 fire blocks", squeezenet, image=224),
    SampleModel("nasnet_large", "NASNet-A (6 @ 4032): 18 cells", nasnet_large, image=331),
    SampleModel("nasnet_mobile", "NASNet-A (4 @ 1056): 12 cells", nasnet_mobile, image=224),
    SampleModel("randwire", "RandWire WS(4, 0.75): 3 randomly wired stages", randwire, image=224),
    SampleModel("bert", "BERT-base with its pooler: 12 layers", bert, sequence=128),
    SampleModel("t5_encoder", "T5-small: the encoder's 6 blocks", t5_encoder, sequence=128),
    SampleModel("t5_decoder", "T5-small: one cached decoder step", t5_decoder, sequence=128),
    SampleModel("deepfm", "DeepFM: 32 embedding tables and an MLP", deepfm),
)

MODELS: Mapping[str, SampleModel] = MappingProxyType({model.name: model for model in _LISTED})
"""The models that are worth measuring, in the command line's order."""

_TINY = SampleModel("tiny", "a few convolutions in three branches", tiny, image=16)
OFFERED: Mapping[str, SampleModel] = MappingProxyType({**MODELS, _TINY.name: _TINY})
"""All models that there are, in the command line's order."""

_LARGEST = 65536


def build(
    name: str, *, image: int | None = None, batch: int = 1, sequence: int | None = None
) -> onnx.ModelProto:
    """Builds a sample model; the same arguments always give the same bytes.

    Args:
        name: A name out of `OFFERED`.
        image: Height and width of the images; None takes the model's default.
        batch: Number of samples in one run.
        sequence: Length of the sequences; None takes the model's default.

    Returns:
        The model, with static shapes.

    Raises:
        ModelError: There is no such model, it has no such option, or a size does not fit it.
    """
    model = OFFERED.get(name)
    if model is None:
        raise ModelError(f"there is no model {name!r}: choose one of {', '.join(OFFERED)}")
    sizes = {"batch": batch}
    for option, asked, default in (
        ("image", image, model.image),
        ("sequence", sequence, model.sequence),
    ):
        if default is not None:
            sizes[option] = default if asked is None else asked
        elif asked is not None:
            raise ModelError(f"{name} has no {option} to size: leave {option} out")
    for option, size in sizes.items():
        if not 1 <= size <= _LARGEST:
            raise ModelError(f"{option} is {size} for {name}: ask for 1 to {_LARGEST}")
    return model.build(**sizes)
