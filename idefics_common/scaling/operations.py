"""Multiply-adds and bytes of each step, and how long they take at least on a machine.

One multiply-add is two floating-point operations. Only products of matrices are counted: projections, MLPs, scores and
sums of attention, with the scores of a prompt in full, masked ones included. The time of a step is that of a roofline
(Williams et al., "Roofline", 2009): the longer of reading its bytes and doing its multiply-adds, and no less can
be had on that machine; norms, activations and softmax come on top, as do calls (`idefics_common.scaling.timed`).
"""

from dataclasses import dataclass

from idefics_common.parameters import Part, iterate
from idefics_common.scaling.kernels import (
    decode_kernels,
    image_key_value_kernels,
    multiply_adds,
    prefill_kernels,
    resampler_kernels,
    vision_kernels,
)
from idefics_common.scaling.memory import image_bytes, text_cache_bytes_per_token, weight_bytes
from idefics_common.scaling.sizes import Precision, Workload

_OF_IMAGES = tuple(f"cross_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_layer_norm"))


@dataclass(frozen=True)
class Hardware:
    """What a machine does at best.

    Attributes:
        name: for tables.
        bytes_per_second: read from memory, as a matrix-vector product over large matrices does.
        multiply_adds_per_second: of a product of large matrices in the precision in use; half of a vendor's FLOPS.
        memory_bytes: what one device holds.
    """

    name: str
    bytes_per_second: float
    multiply_adds_per_second: float
    memory_bytes: int | None = None

    def seconds(self, nbytes: float, multiply_adds: float) -> float:
        """The least time of a step that reads `nbytes` and does `multiply_adds`."""
        return max(nbytes / self.bytes_per_second, multiply_adds / self.multiply_adds_per_second)


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
    return multiply_adds(vision_kernels(config, 1))


def resampler_multiply_adds(config) -> int:
    """Of the resampler for one image; 0 without one."""
    return multiply_adds(resampler_kernels(config, 1))


def image_key_value_multiply_adds(config) -> int:
    """Of the keys and values of one image in all gated blocks."""
    return multiply_adds(image_key_value_kernels(config, 1))


def prefill_multiply_adds(config, workload: Workload) -> int:
    """Of decoder, gated blocks and head for the prompts of a workload; the images are not in it."""
    return multiply_adds(prefill_kernels(config, workload))


def decode_multiply_adds(config, workload: Workload, position: int | None = None) -> int:
    """Of one token in every row, at `position` (by default the first after the prompt)."""
    return multiply_adds(decode_kernels(config, workload, position))


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
    nbytes = decode_bytes(config, precision, workload, position).total
    return hardware.seconds(nbytes, decode_multiply_adds(config, workload, position))


def first_token_seconds(config, precision: Precision, workload: Workload, hardware: Hardware) -> FirstTokenSeconds:
    """The least time until the first token of every row: each step reads its weights once, whatever the batch.

    Images that nobody sees count nowhere, though the model makes keys and values of their zeros.
    """
    count, weights = workload.num_encoded, weight_bytes(config, precision)
    projections = _image_projection_bytes(config, precision)
    text = _decoder_weight_bytes(config, precision) - projections

    def of_images(nbytes, operations):
        return hardware.seconds(nbytes, count * operations) if count else 0.0

    return FirstTokenSeconds(
        vision=of_images(weights[Part.VISION], vision_multiply_adds(config)),
        resampler=of_images(weights[Part.RESAMPLER], resampler_multiply_adds(config)),
        image_key_values=of_images(projections, image_key_value_multiply_adds(config)),
        text=hardware.seconds(text, prefill_multiply_adds(config, workload)),
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
