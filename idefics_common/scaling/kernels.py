"""The operations of each step with their shapes: products of matrices, attention, and passes over activations.

They are those that `idefics_pt` runs without gradients, with fused attention (`sdpa`) and after `fuse_projections`;
what is as small as a position id (masks, tables of angles, the gate's scalars) is left out. Multiply-adds are the sum
over them (`idefics_common.scaling.operations`), and a machine on which each of them has been timed gives the time of a
step (`idefics_common.scaling.timed`).

Axes: see `idefics_common`.
"""

from collections import Counter
from typing import NamedTuple

from idefics_common.scaling.sizes import Sizes, Workload

SUM, LAYER_NORM, RMS_NORM, SILU = "sum", "layer norm", "RMS norm", "SiLU"


class Product(NamedTuple):
    """Rows of `inner` numbers times a matrix that makes `outer` numbers of each.

    Attributes:
        with_gelu: the results go through GELU before they are written.
        is_fused: `fuse_projections` decides how the matrix lies in memory.
    """

    rows: int
    inner: int
    outer: int
    with_gelu: bool = False
    is_fused: bool = False

    @property
    def multiply_adds(self) -> int:
        """Of all rows."""
        return self.rows * self.inner * self.outer


class Attention(NamedTuple):
    """Scores, softmax and sums of all heads; `is_causal` and `has_mask` say what kind of mask there is, if any.

    Scores that a mask forbids are counted as the others.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    head_width: int
    is_causal: bool = False
    has_mask: bool = False

    @property
    def multiply_adds(self) -> int:
        """Of scores and sums."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.head_width


class Pass(NamedTuple):
    """One pass over activations that makes `rows` x `width` new values.

    Attributes:
        kind: `LAYER_NORM` or `RMS_NORM` over the width, `SILU`, or `SUM` for whatever costs no more than to read and to
            write: sums and products of two tensors, copies.
    """

    kind: str
    rows: int
    width: int

    multiply_adds = 0


Kernels = Counter[Product | Attention | Pass]


def multiply_adds(kernels: Kernels) -> int:
    """Of all of them."""
    return sum(count * kernel.multiply_adds for kernel, count in kernels.items())


def vision_kernels(config, images: int) -> Kernels:
    """The vision tower on so many images of the model's own size."""
    sizes = Sizes.of(config)
    width, hidden, rows = sizes.E, sizes.vision_F, images * sizes.P
    kernels = Counter({Product(images * (sizes.P - 1), sizes.patch, width): 1, Pass(LAYER_NORM, images, width): 1})
    kernels[Pass(SUM, rows, width)] += 2 + 2 * sizes.vision_layers  # class token, positions; residuals
    kernels[Pass(LAYER_NORM, rows, width)] += 1 + 2 * sizes.vision_layers
    kernels[Product(rows, width, width)] += 4 * sizes.vision_layers
    kernels[Product(rows, width, hidden, with_gelu=True)] += sizes.vision_layers
    kernels[Product(rows, hidden, width)] += sizes.vision_layers
    heads = sizes.vision_H
    kernels[Attention(images, heads, sizes.P, sizes.P, width // heads)] += sizes.vision_layers
    return kernels


def resampler_kernels(config, images: int) -> Kernels:
    """The resampler on vision tokens of so many images; nothing without one."""
    sizes, perceiver, kernels = Sizes.of(config), config.perceiver_config, Counter()
    if not sizes.depth:
        return kernels
    width, inner, latents, tokens = sizes.E, sizes.inner, images * sizes.L, images * sizes.P
    sources = tokens + latents
    heads, head_width = perceiver.resampler_n_heads, perceiver.resampler_head_dim
    kernels[Pass(LAYER_NORM, tokens, width)] += 1
    kernels[Pass(LAYER_NORM, latents, width)] += 2
    kernels[Pass(SUM, sources, width)] += 1  # tokens and latents behind each other
    kernels[Product(latents, width, inner)] += 1
    kernels[Product(sources, width, inner)] += 2
    if perceiver.qk_layer_norms_perceiver:
        kernels[Pass(LAYER_NORM, latents * heads, head_width)] += 1
        kernels[Pass(LAYER_NORM, sources * heads, head_width)] += 1
    kernels[Attention(images, heads, sizes.L, sizes.P + sizes.L, head_width)] += 1
    kernels[Product(latents, inner, width)] += 1
    kernels[Product(latents, width, 4 * width)] += 1
    kernels[Pass(SUM, latents, 4 * width)] += 1  # ReLU
    kernels[Product(latents, 4 * width, width)] += 1
    kernels[Pass(SUM, latents, width)] += 2
    kernels = _times(kernels, sizes.depth)
    kernels[Pass(LAYER_NORM, latents, width)] += 1
    return kernels


def image_key_value_kernels(config, images: int) -> Kernels:
    """Keys and values of so many images in all gated blocks."""
    sizes = Sizes.of(config)
    rows = images * sizes.memory_tokens
    kernels = Counter({Product(rows, sizes.E, sizes.D): 2 * sizes.blocks})
    if config.qk_layer_norms:
        kernels[Pass(RMS_NORM, rows * sizes.H, sizes.K)] += sizes.blocks
    return kernels


def prefill_kernels(config, workload: Workload) -> Kernels:
    """Decoder, gated blocks and head on the prompts of a workload; the images are not in it."""
    return _text_kernels(config, workload.batch, workload.text_tokens, workload.text_tokens, workload.images)


def decode_kernels(config, workload: Workload, position: int | None = None) -> Kernels:
    """One token in every row, at `position` (by default the first after the prompt)."""
    keys = (workload.text_tokens if position is None else position) + 1
    return _text_kernels(config, workload.batch, 1, keys, workload.num_attended)


def _text_kernels(config, batch: int, length: int, keys: int, images: int) -> Kernels:
    sizes, rows = Sizes.of(config), batch * length
    layer, block = _mlp(sizes, rows), _mlp(sizes, rows)
    layer[Pass(RMS_NORM, rows, sizes.D)] += 1
    layer[Product(rows, sizes.D, 3 * sizes.D, is_fused=True)] += 1
    # queries and keys turned, in three passes each; keys and values into the cache; the residual
    layer[Pass(SUM, rows, sizes.D)] += 2 * 3 + 2 + 1
    layer[Attention(batch, sizes.H, length, keys, sizes.K, is_causal=length > 1)] += 1
    layer[Product(rows, sizes.D, sizes.D)] += 1
    block[Pass(SUM, rows, sizes.D)] += 1  # the gate
    if images:
        block[Pass(RMS_NORM, rows, sizes.D)] += 1
        block[Product(rows, sizes.D, sizes.D)] += 2
        if config.qk_layer_norms:
            block[Pass(RMS_NORM, rows * sizes.H, sizes.K)] += 1
        block[Attention(batch, sizes.H, length, images * sizes.memory_tokens, sizes.K, has_mask=True)] += 1
        block[Pass(SUM, rows, sizes.D)] += 3  # both gates and the residual
    kernels = _times(layer, sizes.layers) + _times(block, sizes.blocks)
    kernels[Pass(SUM, rows, sizes.D)] += 3 if config.additional_vocab_size else 1  # both embeddings, and the choice
    kernels[Pass(RMS_NORM, rows, sizes.D)] += 1
    kernels[Product(batch, sizes.D, config.vocab_size, is_fused=True)] += 1
    if config.additional_vocab_size:
        kernels[Product(batch, sizes.D, config.additional_vocab_size)] += 1
        kernels[Pass(SUM, batch, sizes.V)] += 1
    return kernels


def _mlp(sizes: Sizes, rows: int) -> Kernels:
    """The gated MLP with its norm and its residual."""
    return Counter(
        {
            Pass(RMS_NORM, rows, sizes.D): 1,
            Product(rows, sizes.D, 2 * sizes.F, is_fused=True): 1,
            Pass(SILU, rows, sizes.F): 1,
            Pass(SUM, rows, sizes.F): 1,
            Product(rows, sizes.F, sizes.D): 1,
            Pass(SUM, rows, sizes.D): 1,
        }
    )


def _times(kernels: Kernels, factor: int) -> Kernels:
    return Counter({kernel: factor * count for kernel, count in kernels.items()})
