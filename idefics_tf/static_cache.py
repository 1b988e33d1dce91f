"""Keys and values of the text in tensors of a fixed size, so that one compiled step serves every position.

Unusual: how many positions are filled is a tensor beside them, and what lies behind is masked like any later position.
Decoder layers use such a cache as they use a `LayerCache`.

In `idefics_pt`, transformers' `StaticCache` does it. Axes: see `idefics_common`; C positions fit in a cache, R rows of
text are n for each of B prompts.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from idefics_tf.cache import ImageMemory, TFIdeficsCache


class StaticLayerCache(NamedTuple):
    """Keys and values (R, H, C, K) of one decoder layer, `length` positions of which are filled."""

    key: Any
    value: Any
    length: Any

    def num_keys(self, num_new):
        """How many keys there are for attention to look at: all C, whatever is filled."""
        return self.key.shape[2] or tf.shape(self.key)[2]

    def extended(self, key, value) -> "StaticLayerCache":
        """With the keys and values (R, H, T, K) of later positions written behind these."""
        return StaticLayerCache(
            _written(self.key, key, self.length),
            _written(self.value, value, self.length),
            self.length + tf.shape(key)[2],
        )


def _written(cache_RHCK, new_RHTK, start):
    # in a loop TensorFlow copies the tensor to write to it, which costs less than a select or a concatenation does
    rows, heads, length, _ = tf.unstack(tf.shape(new_RHTK))
    place_RHT = tf.meshgrid(tf.range(rows), tf.range(heads), start + tf.range(length), indexing="ij")
    return tf.tensor_scatter_nd_update(cache_RHCK, tf.stack(place_RHT, axis=-1), new_RHTK)


def with_capacity(cache: TFIdeficsCache, capacity, copies: int) -> tuple:
    """The (key, value) of each layer of a `TFIdeficsCache` of B prompts, with room for `capacity` positions.

    Args:
        copies: adjacent rows for each prompt: its beams or samples.

    Returns:
        for each layer a pair of (B * copies, H, C, K).
    """

    def widened(tensor_BHSK):
        missing = capacity - tf.shape(tensor_BHSK)[2]
        padded = tf.pad(tensor_BHSK, ((0, 0), (0, 0), (0, missing), (0, 0)))
        if isinstance(capacity, int):
            padded = tf.ensure_shape(padded, (None, None, capacity, None))
        return tf.repeat(padded, copies, axis=0) if copies > 1 else padded

    return tuple((widened(layer.key), widened(layer.value)) for layer in cache.layers)


def as_cache(key_values, length, image_memory: ImageMemory | None) -> TFIdeficsCache:
    """A cache for the next call, from the result of `with_capacity` and how many positions of it are filled."""
    return TFIdeficsCache(tuple(StaticLayerCache(key, value, length) for key, value in key_values), image_memory)
