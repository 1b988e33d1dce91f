"""Bytes that a model holds while it reads and writes: weights, caches, and the peak of a prompt.

The peaks count tensors that are alive at once in `idefics_pt` with fused attention (`sdpa`): not scratch memory inside
kernels, nor what an allocator keeps, nor the framework itself.
"""

from dataclasses import dataclass

from benchmarks.planning.sizes import Precision, Workload, sizes_of
from idefics_common.parameters import Part, expand

_LEAST_ROOM, _ROOM_SHARE = 64, 4  # of `idefics_pt.growing_cache`: how many positions a text cache has to spare
_PIXEL_BYTES = 4  # processors make float32 pixels, whatever the model's precision


@dataclass(frozen=True)
class ImageBytes:
    """Bytes that a cache keeps of one image.

    Attributes:
        key_values: keys and values in all gated blocks.
        features: what text attends to, once more as they came from the vision tower or the resampler.
    """

    key_values: int
    features: int

    @property
    def total(self) -> int:
        """Bytes of one image."""
        return self.key_values + self.features


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of a workload from loading to the last new token.

    Attributes:
        weights: of all parameters.
        prompt_cache, full_cache: of the text cache after the prompt, and after the last new token, with its room to
            grow.
        images: what the cache keeps of all images.
        encoding: activations while images are encoded. reading: while the decoder reads the prompt.
    """

    weights: int
    prompt_cache: int
    full_cache: int
    images: int
    encoding: int
    reading: int

    @property
    def peak(self) -> int:
        """The most bytes alive at once: encoding images, reading the prompt, or at the last token."""
        reading = self.prompt_cache + self.images + self.reading
        return self.weights + max(self.encoding, reading, self.full_cache + self.images)


def weight_bytes(config, precision: Precision) -> dict[Part, int]:
    """Bytes of the parameters of each part; tied ones count where they are defined."""
    counts = dict.fromkeys(Part, 0)
    for parameter in expand(config):
        if parameter.tied_to is None:
            counts[parameter.part] += precision.parameter_bytes(parameter)
    return counts


def text_cache_bytes_per_token(config, precision: Precision) -> int:
    """Bytes of keys and values that one position of one row leaves in the text cache."""
    sizes = sizes_of(config)
    return 2 * sizes.layers * sizes.D * precision.bytes_per_value


def image_bytes(config, precision: Precision) -> ImageBytes:
    """Bytes that the cache keeps of one image; padded images take as much, and beams of one prompt share theirs."""
    sizes, width = sizes_of(config), precision.bytes_per_value
    return ImageBytes(
        key_values=2 * sizes.blocks * sizes.memory_tokens * sizes.D * width,
        features=sizes.memory_tokens * sizes.E * width,
    )


def inference_memory(config, precision: Precision, workload: Workload) -> InferenceMemory:
    """Bytes of reading the prompts of a workload and of writing its new tokens."""
    cache = workload.batch * text_cache_bytes_per_token(config, precision)
    return InferenceMemory(
        weights=sum(weight_bytes(config, precision).values()),
        prompt_cache=cache * _cache_positions(workload.text_tokens, 0),
        full_cache=cache * _cache_positions(workload.text_tokens, workload.new_tokens),
        images=workload.num_images * image_bytes(config, precision).total,
        encoding=_encoding_bytes(config, precision, workload),
        reading=_reading_bytes(config, precision, workload),
    )


def _cache_positions(prompt: int, new: int) -> int:
    """Positions that a growing cache has room for: it moves to a larger buffer whenever the last one is full."""
    held, total = 0, prompt
    while held < prompt + new:
        held = total + max(_LEAST_ROOM, total // _ROOM_SHARE)
        total = held + 1
    return held


def _encoding_bytes(config, precision: Precision, workload: Workload) -> int:
    """The peak of vision tower and resampler, all images at once, with the images and the embedded text.

    The tower's peak is in the MLP of a layer: the output of the layer before, three more of its width (attention's
    output, the sum with it, its norm), and the MLP before and after activation.
    """
    sizes, width = sizes_of(config), precision.bytes_per_value
    tower = sizes.P * (4 * sizes.E + 2 * sizes.vision_F)
    features = sizes.P * sizes.E
    # latents before, after and inside attention; sources, keys and values (one more while norms and heads are arranged)
    resampler = features + (sizes.P + sizes.L) * (sizes.E + 3 * sizes.inner) + 4 * sizes.L * sizes.E
    per_image = max(tower, resampler if sizes.depth else 0)
    pixels = sizes.pixels * (_PIXEL_BYTES if width == _PIXEL_BYTES else _PIXEL_BYTES + width)
    text = workload.positions * sizes.D * width
    return workload.num_images * (per_image * width + pixels) + text if workload.images else 0


def _reading_bytes(config, precision: Precision, workload: Workload) -> int:
    """The peak of the decoder over a prompt, caches aside, and the logits of its last position.

    The peak of a layer is in its MLP: its input, attention's output, the sum with it and its norm, three of the MLP's
    width (gate, up, product), and then the activated gate or the result; or in cross-attention, where the mask becomes
    a term of every score.
    """
    sizes, width = sizes_of(config), precision.bytes_per_value
    memory = workload.images * sizes.memory_tokens
    mlp = 4 * sizes.D + 3 * sizes.F + max(sizes.D, sizes.F)
    attention, rotation, mask = 6 * sizes.D + memory, 2 * sizes.K, memory
    values = workload.positions * (max(mlp, attention) + rotation) + workload.batch * sizes.V
    return values * width + workload.positions * mask
