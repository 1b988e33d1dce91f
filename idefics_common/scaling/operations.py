"""Multiply-adds and bytes of each step, and how long they take at least on a machine.

One multiply-add is two floating-point operations. Only products of matrices are counted: projections, MLPs, scores and
sums of attention, with the scores of a prompt in full, masked ones included. The time of a step is that of a roofline
(Williams et al., "Roofline", 2009): the longer of reading its bytes and doing its multiply-adds, and no less can
be had on that machine; norms, activations and softmax come on top, as do calls, for which `Hardware` has a term.
"""

from dataclasses import dataclass

from idefics_common.parameters import Part, iterate
from idefics_common.scaling.memory import image_bytes, text_cache_bytes_per_token, weight_bytes
from idefics_common.scaling.sizes import Precision, Sizes, Workload

_OF_IMAGES = tuple(f"cross_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_layer_norm"))


@dataclass(frozen=True)
class Hardware:
    """What a machine does at best.

    Attributes:
        name: for tables.
        bytes_per_second: read from memory, as a matrix-vector product over large matrices does.
        multiply_adds_per_second: of a product of large matrices in the precision in use; half of a vendor's FLOPS.
        seconds_per_layer: what any layer takes however small it is: calls, kernels, Python.
        memory_bytes: what one device holds.
    """

    name: str
    bytes_per_second: float
    multiply_adds_per_second: float
    seconds_per_layer: float = 0.0
    memory_bytes: int | None = None

    def seconds(self, nbytes: float, multiply_adds: float, layers: int = 0) -> float:
        """The least time of a step that reads `nbytes` and does `multiply_adds` in so many layers."""
        bound = max(nbytes / self.bytes_per_second, multiply_adds / self.multiply_adds_per_second)
        return bound + layers * self.seconds_per_layer


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes read to make one token in every row.

    Attributes:
        weights: decoder, gated blocks without their projections of images, and head; a few rows of the embedding aside.
        text_cache: keys and values of all positions. images: keys and values in all gated blocks of the images that are
            looked at.
    """

    weights: int
    text_cache: int
    images: int

    @property
    def total(self) -> int:
        """Bytes of one step."""
        return self.weights + self.text_cache + self.images


@dataclass(frozen=True)
class FirstTokenSeconds:
    """Seconds until the first token, by step."""

    vision: float
    resampler: float
    image_key_values: float
    text: float

    @property
    def total(self) -> float:
        """Seconds of all steps, one after the other."""
        return self.vision + self.resampler + self.image_key_values + self.text


def vision_multiply_adds(config) -> int:
    """Of the vision tower for one image of the model's own size."""
    sizes = Sizes.of(config)
    layer = 4 * sizes.P * sizes.E**2 + 2 * sizes.P**2 * sizes.E + 2 * sizes.P * sizes.E * sizes.vision_F
    return (sizes.P - 1) * sizes.patch * sizes.E + sizes.vision_layers * layer


def resampler_multiply_adds(config) -> int:
    """Of the resampler for one image; 0 without one."""
    sizes = Sizes.of(config)
    sources = sizes.P + sizes.L
    projections = 2 * (sizes.L + sources) * sizes.E * sizes.inner
    mlp = 2 * sizes.L * sizes.E * 4 * sizes.E
    return sizes.depth * (projections + 2 * sizes.L * sources * sizes.inner + mlp)


def image_key_value_multiply_adds(config) -> int:
    """Of the keys and values of one image in all gated blocks."""
    sizes = Sizes.of(config)
    return 2 * sizes.blocks * sizes.memory_tokens * sizes.E * sizes.D


def prefill_multiply_adds(config, workload: Workload) -> int:
    """Of decoder, gated blocks and head for the prompts of a workload; the images are not in it."""
    sizes = Sizes.of(config)
    keys = workload.text_tokens
    return workload.positions * _multiply_adds_per_token(config, keys, workload.images) + (
        workload.batch * sizes.D * sizes.V
    )


def decode_multiply_adds(config, workload: Workload, position: int | None = None) -> int:
    """Of one token in every row, at `position` (by default the first after the prompt)."""
    sizes = Sizes.of(config)
    keys = (workload.text_tokens if position is None else position) + 1
    return workload.batch * (_multiply_adds_per_token(config, keys, workload.num_attended) + sizes.D * sizes.V)


def _multiply_adds_per_token(config, keys: int, images: int) -> int:
    """One position through all layers and gated blocks; without images a block is its MLP alone."""
    sizes = Sizes.of(config)
    mlp = 3 * sizes.D * sizes.F
    layer = 4 * sizes.D**2 + 2 * keys * sizes.D + mlp
    cross = 2 * sizes.D**2 + 2 * images * sizes.memory_tokens * sizes.D if images else 0
    return sizes.layers * layer + sizes.blocks * (cross + mlp)


def decode_bytes(config, precision: Precision, workload: Workload, position: int | None = None) -> DecodeBytes:
    """Bytes of one token in every row, at `position` (by default the first after the prompt).

    Rows that hold the same prompt (beams) are counted as prompts of their own here.
    """
    keys = (workload.text_tokens if position is None else position) + 1
    images = image_bytes(config, precision).key_values
    return DecodeBytes(
        weights=_decoder_weight_bytes(config, precision) - _image_projection_bytes(config, precision),
        text_cache=workload.batch * keys * text_cache_bytes_per_token(config, precision),
        images=workload.batch * workload.num_attended * images,
    )


def decode_seconds(config, precision: Precision, workload: Workload, hardware: Hardware, position=None) -> float:
    """The least time of one token in every row."""
    sizes = Sizes.of(config)
    nbytes = decode_bytes(config, precision, workload, position).total
    operations = decode_multiply_adds(config, workload, position)
    return hardware.seconds(nbytes, operations, sizes.layers + sizes.blocks)


def first_token_seconds(config, precision: Precision, workload: Workload, hardware: Hardware) -> FirstTokenSeconds:
    """The least time until the first token of every row: each step reads its weights once, whatever the batch."""
    sizes, count = Sizes.of(config), workload.num_encoded
    weights = weight_bytes(config, precision)
    projections = _image_projection_bytes(config, precision)
    text = _decoder_weight_bytes(config, precision) - projections

    def of_images(nbytes, operations, layers):
        return hardware.seconds(nbytes, count * operations, layers) if count else 0.0

    return FirstTokenSeconds(
        vision=of_images(weights[Part.VISION], vision_multiply_adds(config), sizes.vision_layers),
        resampler=of_images(weights[Part.RESAMPLER], resampler_multiply_adds(config), sizes.depth),
        image_key_values=of_images(projections, image_key_value_multiply_adds(config), 0),
        text=hardware.seconds(text, prefill_multiply_adds(config, workload), sizes.layers + sizes.blocks),
    )


def _decoder_weight_bytes(config, precision: Precision) -> int:
    """Decoder, gated blocks and head; a tied head is read like any other."""
    parts = (Part.DECODER, Part.CROSS_ATTENTION, Part.HEAD)
    return sum(precision.parameter_bytes(parameter) for parameter in iterate(config) if parameter.part in parts)


def _image_projection_bytes(config, precision: Precision) -> int:
    """What gated blocks make keys and values of images with."""
    return sum(
        precision.parameter_bytes(parameter)
        for parameter in iterate(config)
        if parameter.part is Part.CROSS_ATTENTION and parameter.name.endswith(_OF_IMAGES)
    )
