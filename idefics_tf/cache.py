"""What a cache holds: keys and values of the text, layer by layer, and of the images, made once.

Unusual: a cache is a value. A call takes one and hands back another; nothing is changed in place, so it can pass
through `tf.function` and be kept, copied or thrown away like any tensor. The image memory has one row per prompt, not
per beam.

Mirrors `idefics_pt/cache.py`. Axes: see `idefics_common`.
"""

from typing import Any, NamedTuple

from keras import ops


class ImageMemory(NamedTuple):
    """Images that earlier calls have seen.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        last_mask_BI: which images the last position may see, boolean; the rows of the text, beams included.
    """

    hidden_states_BILE: Any
    key_values: tuple[tuple[Any, Any], ...]
    last_mask_BI: Any

    @property
    def num_images(self):
        """Images per row, padding included: a number, or a scalar tensor where the graph does not know it."""
        return ops.shape(self.hidden_states_BILE)[1]


class LayerCache(NamedTuple):
    """Keys and values (B, H, S, K) of one decoder layer."""

    key: Any
    value: Any

    @property
    def length(self):
        """Positions so far: a number, or a scalar tensor where the graph does not know it."""
        return ops.shape(self.key)[2]

    def num_keys(self, num_new):
        """How many keys there are for attention to look at once `num_new` positions have been added."""
        return self.length + num_new

    def extended(self, key, value) -> "LayerCache":
        """With the keys and values (B, H, T, K) of later positions after these."""
        return LayerCache(ops.concatenate((self.key, key), axis=2), ops.concatenate((self.value, value), axis=2))


class TFIdeficsCache(NamedTuple):
    """`past_key_values`: all that later calls need of earlier ones.

    Attributes:
        layers: of each decoder layer: `LayerCache`, or within `generate` `idefics_tf.static_cache.StaticLayerCache`.
        image_memory: `ImageMemory`, or None without images.
    """

    layers: tuple[LayerCache, ...]
    image_memory: ImageMemory | None = None

    def get_seq_length(self):
        """Positions so far: a number, or a scalar tensor where the graph does not know it."""
        return self.layers[0].length

    def num_keys(self, num_new):
        """See `LayerCache.num_keys`."""
        return self.layers[0].num_keys(num_new)


def recall_images(cache: TFIdeficsCache | None) -> ImageMemory | None:
    """The image memory of `cache`, or None."""
    return None if cache is None else cache.image_memory
