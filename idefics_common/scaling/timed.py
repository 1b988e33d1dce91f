"""Seconds to expect of a step on a machine where each of its operations has been timed by itself.

Unlike the roofline of `idefics_common.scaling.operations`, which nothing can beat, this adds up: the operations of the
step (`idefics_common.scaling.kernels`) one after the other, each as long as it takes alone, and what calls take besides
them, in Python, however small the model is. A CPU needs it: it does not read weights for one operation while it
multiplies for another, and no single rate holds for all shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import numpy as np

from idefics_common.scaling.kernels import (
    Kernels,
    decode_kernels,
    image_key_value_kernels,
    prefill_kernels,
    resampler_kernels,
    vision_kernels,
)
from idefics_common.scaling.sizes import Sizes, Workload


@dataclass(frozen=True)
class Parts:
    """How often each part of the model runs in a call; `call` is 1."""

    call: int
    vision_layers: int
    resampler_blocks: int
    layers: int
    blocks: int

    @classmethod
    def of_prompt(cls, config, workload: Workload) -> "Parts":
        """In the call that reads the prompts."""
        sizes = Sizes.of(config)
        images = (sizes.vision_layers, sizes.depth) if workload.num_encoded else (0, 0)
        return cls(1, *images, sizes.layers, sizes.blocks)

    @classmethod
    def of_step(cls, config) -> "Parts":
        """In a call that makes one more token."""
        sizes = Sizes.of(config)
        return cls(1, 0, 0, sizes.layers, sizes.blocks)


@dataclass(frozen=True)
class CallSeconds:
    """What a call of the model takes besides its operations: by itself, and for each part that runs in it."""

    call: float
    vision_layer: float
    resampler_block: float
    layer: float
    block: float

    @classmethod
    def fitted(cls, calls: Iterable[tuple[Parts, float]]) -> "CallSeconds":
        """From calls of models of several depths: their parts, and the seconds that their operations do not explain.

        What no call has, or what always comes in the same number, counts as nothing, or as shared.
        """
        parts, seconds = zip(*((astuple(parts), seconds) for parts, seconds in calls), strict=True)
        return cls(*np.linalg.lstsq(np.array(parts, float), np.array(seconds), rcond=None)[0].tolist())

    def of(self, parts: Parts) -> float:
        """Of a call with these parts."""
        return sum(count * each for count, each in zip(astuple(parts), astuple(self), strict=True))


def kernel_seconds(kernels: Kernels, seconds: Mapping) -> float:
    """Of operations one after the other, given the seconds of each; KeyError if one is not among them."""
    return sum(count * seconds[kernel] for kernel, count in kernels.items())


def first_token_kernels(config, workload: Workload) -> Kernels:
    """All operations until the first token of every row."""
    kernels, count = prefill_kernels(config, workload), workload.num_encoded
    if count:
        kernels += vision_kernels(config, count) + resampler_kernels(config, count)
        kernels += image_key_value_kernels(config, workload.batch * workload.images)
    return kernels


def expected_first_token_seconds(config, workload: Workload, seconds: Mapping, calls: CallSeconds) -> float:
    """Seconds to expect until the first token of every row.

    Args:
        seconds: of each of `first_token_kernels`. calls: of a call with a prompt like this.
    """
    kernels = first_token_kernels(config, workload)
    return kernel_seconds(kernels, seconds) + calls.of(Parts.of_prompt(config, workload))


def expected_decode_seconds(
    config, workload: Workload, seconds: Mapping, calls: CallSeconds, position: int | None = None
) -> float:
    """Seconds to expect for one token in every row, at `position` (by default the first after the prompt).

    Args:
        seconds: of each of `decode_kernels`. calls: of a call for one token after a prompt like this.
    """
    kernels = decode_kernels(config, workload, position)
    return kernel_seconds(kernels, seconds) + calls.of(Parts.of_step(config))
