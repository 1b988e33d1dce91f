"""What the formulae are written in: precisions, workloads, and the numbers of a configuration."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

from idefics_common.parameters import HEAD, Kind, Parameter, Part, dimensions, num_cross_layers

_ADDED_HEAD = f"{HEAD.name}.additional_fc.weight"


@dataclass(frozen=True)
class Precision:
    """How many bytes a number takes.

    Attributes:
        name: what users call it.
        bytes_per_value: of a parameter, an activation or a cached key or value.
        quantized_parts: parts of the model whose linear kernels are held in int8, one byte per weight, with one
            float32 scale per output; they are multiplied in `bytes_per_value`.
    """

    name: str
    bytes_per_value: int
    quantized_parts: frozenset[Part] = frozenset()

    def quantizes(self, parameter: Parameter) -> bool:
        """Whether a parameter is held in int8: embeddings are not, nor what is tied to them, nor the added head."""
        is_kernel = parameter.kind is Kind.LINEAR and parameter.part in self.quantized_parts
        return is_kernel and parameter.tied_to is None and parameter.name != _ADDED_HEAD

    def parameter_bytes(self, parameter: Parameter, shape: tuple[int, ...] | None = None) -> int:
        """Bytes of a parameter, or of the piece of it that has `shape`."""
        shape = parameter.shape if shape is None else shape
        if self.quantizes(parameter):
            return math.prod(shape) + 4 * shape[0]
        return self.bytes_per_value * math.prod(shape)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", 4),
        Precision("bfloat16", 2),
        Precision("float16", 2),
        Precision("int8", 2, frozenset({Part.DECODER, Part.CROSS_ATTENTION, Part.HEAD})),
    )
}
"""By name. "int8" quantises the weights of decoder, gated blocks and head; all the rest stays bfloat16."""


@dataclass(frozen=True)
class Workload:
    """What is asked of a model at once.

    Attributes:
        batch: rows of text.
        images: images per row; all count as seen, while the models do not encode those that pad a row.
        text_tokens: positions per row, all of one length; of padded rows the mask of self-attention comes on top.
        new_tokens: how many positions each row grows by.
    """

    batch: int = 1
    images: int = 1
    text_tokens: int = 24
    new_tokens: int = 0

    @property
    def positions(self) -> int:
        """Positions of the prompts, all rows together."""
        return self.batch * self.text_tokens

    @property
    def num_images(self) -> int:
        """Images of all rows together."""
        return self.batch * self.images


def sizes_of(config) -> SimpleNamespace:
    """The numbers of a configuration that bytes depend on, named by the project's axes.

    Returns:
        D, F, V, K: of the text decoder; V with the additional vocabulary.
        layers, blocks: numbers of decoder layers and of gated cross-attention blocks.
        E, P, vision_F, vision_layers: of the vision tower.
        pixels: numbers in one image.
        L, inner, depth: latents, H * K and blocks of the resampler; `depth` is 0 without one.
        memory_tokens: tokens per image that text attends to, L or P.
    """
    axes, vision = dimensions(config), config.vision_config
    return SimpleNamespace(
        D=axes["D"],
        F=axes["F"],
        V=axes["V"] + axes["additional V"],
        K=axes["text K"],
        layers=config.num_hidden_layers,
        blocks=num_cross_layers(config),
        E=axes["E"],
        P=axes["P"],
        vision_F=axes["vision F"],
        vision_layers=vision.num_hidden_layers,
        pixels=axes["C"] * vision.image_size**2,
        L=axes["L"],
        inner=axes["perceiver H*K"],
        depth=config.perceiver_config.resampler_depth if config.use_resampler else 0,
        memory_tokens=axes["L"] if config.use_resampler else axes["P"],
    )
