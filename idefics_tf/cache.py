"""What a cache holds: keys and values of the text, layer by layer, and of the images, made once.

Unusual: a cache is a value. A call takes one and hands back another; nothing is changed in place, so it can pass
through `tf.function` and be kept, copied or thrown away like any tensor. The image memory has one row per prompt, not
per beam: cropping and repeating the text leave it as it is. Who picks or permutes rows of a cache does it by
`batch_select_indices`, which takes the images along.

Mirrors `idefics_pt/cache.py`. Axes: see `idefics_common`.
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops


class ImageMemory(NamedTuple):
    """Images that earlier calls have seen; every tensor has one row per prompt but for `last_mask_BI`.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        last_mask_BI: which images the last position may see, boolean; the rows of the text, beams included.
        encoded_BI: which images were encoded, boolean; the others could not be seen by anyone and are zeros.
        sources: the images as they were given, under the name of the argument; empty if they came in several forms or
            sizes.
        first_seen_B: the first position of the text that may see an image, int32; behind the text if none may.
        text_length_B: how much text the cache held after the call that brought the last image, int32.
        mask_start_B: the first position from which on all text may see what `last_mask_BI` says, int32.
    """

    hidden_states_BILE: Any
    key_values: tuple[tuple[Any, Any], ...]
    last_mask_BI: Any
    encoded_BI: Any
    sources: dict[str, Any]
    first_seen_B: Any
    text_length_B: Any
    mask_start_B: Any

    @property
    def num_images(self):
        """Images per row, padding included: a number, or a scalar tensor where the graph does not know it."""
        return ops.shape(self.hidden_states_BILE)[1]

    @property
    def num_rows(self):
        """Rows of images; the rows of text are a multiple of them. A number, or a scalar tensor."""
        return ops.shape(self.hidden_states_BILE)[0]

    def holds(self, name: str, images) -> bool:
        """Whether these are exactly the images that were given before; not for graphs, which cannot answer."""
        known = self.sources.get(name)
        if known is None or known.shape != images.shape:
            return False
        return known is images or bool(ops.all(ops.equal(known, ops.cast(images, known.dtype))))

    def rows(self, indices) -> "ImageMemory":
        """The memory of other prompts: row i of the result is row ``indices[i]``; indices (rows,) may repeat."""
        by_prompt = ops.reshape(self.last_mask_BI, (self.num_rows, -1, self.num_images))
        memory = self._replace(last_mask_BI=by_prompt)
        memory = keras.tree.map_structure(lambda tensor: ops.take(tensor, indices, axis=0), memory)
        return memory._replace(last_mask_BI=ops.reshape(memory.last_mask_BI, (-1, self.num_images)))

    def narrowed(self) -> "ImageMemory":
        """The memory of the one image per prompt that the last position of its text sees; the whole one, without
        sources, if that of any prompt sees several.

        A loop asks this once: its steps see what the last position saw, and then read no other image.
        """
        rows, num_images, tokens, width = ops.shape(self.hidden_states_BILE)
        _, heads, _, head_width = self.key_values[0][0].shape
        seen_BI = ops.any(ops.reshape(self.last_mask_BI, (rows, -1, num_images)), axis=1)
        image_B = ops.argmax(ops.cast(seen_BI, "int32"), axis=1)
        head_BH = ops.expand_dims(ops.arange(rows) * heads, 1) + ops.arange(heads)

        def sole_image(x_BHMK):
            # of a table with a row for each head and image, so that no other image is copied on the way
            index_BH = head_BH * num_images + ops.expand_dims(image_B, 1)
            table = ops.reshape(x_BHMK, (-1, tokens * head_width))
            return ops.reshape(ops.take(table, index_BH, axis=0), (rows, heads, tokens, head_width))

        def sole():
            index_B = ops.arange(rows) * num_images + image_B
            states = ops.take(ops.reshape(self.hidden_states_BILE, (-1, tokens * width)), index_B, axis=0)
            return self._replace(
                hidden_states_BILE=ops.reshape(states, (rows, 1, tokens, width)),
                key_values=tuple((sole_image(key), sole_image(value)) for key, value in self.key_values),
                last_mask_BI=ops.any(self.last_mask_BI, axis=1, keepdims=True),
                encoded_BI=ops.expand_dims(ops.take(ops.reshape(self.encoded_BI, (-1,)), index_B), 1),
                sources={},
            )

        looks_at_one = ops.all(ops.sum(ops.cast(seen_BI, "int32"), axis=1) <= 1)
        return tf.cond(looks_at_one, sole, lambda: self._replace(sources={}))

    def images_from(self, start) -> "ImageMemory":
        """The memory without the first `start` images of each row."""
        first = start * self.hidden_states_BILE.shape[2]
        return self._replace(
            hidden_states_BILE=self.hidden_states_BILE[:, start:],
            key_values=tuple((key[:, :, first:], value[:, :, first:]) for key, value in self.key_values),
            last_mask_BI=self.last_mask_BI[:, start:],
            encoded_BI=self.encoded_BI[:, start:],
            sources={name: images[:, start:] for name, images in self.sources.items()},
        )

    def spec(self) -> "ImageMemory":
        """See `TFIdeficsCache.spec`."""
        return ImageMemory(
            hidden_states_BILE=open_spec(self.hidden_states_BILE, 0, 1),
            key_values=tuple((open_spec(key, 0, 2), open_spec(value, 0, 2)) for key, value in self.key_values),
            last_mask_BI=open_spec(self.last_mask_BI, 0, 1),
            encoded_BI=open_spec(self.encoded_BI, 0, 1),
            sources={name: open_spec(images, 0, 1) for name, images in self.sources.items()},
            first_seen_B=open_spec(self.first_seen_B, 0),
            text_length_B=open_spec(self.text_length_B, 0),
            mask_start_B=open_spec(self.mask_start_B, 0),
        )


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

    def crop(self, max_length) -> "TFIdeficsCache":
        """With the first `max_length` positions only, or, if that is negative, without that many of the last.

        A later call finds out whether what is left of the text has seen the images; if not, they are forgotten.
        """
        return self._replace(layers=self._mapped(lambda tensor: tensor[:, :, :max_length]))

    def batch_repeat_interleave(self, repeats: int) -> "TFIdeficsCache":
        """With each row of text `repeats` times, which share its images."""
        memory = self.image_memory
        if memory is not None:
            memory = memory._replace(last_mask_BI=ops.repeat(memory.last_mask_BI, repeats, axis=0))
        return TFIdeficsCache(self._mapped(lambda tensor: ops.repeat(tensor, repeats, axis=0)), memory)

    def batch_select_indices(self, indices) -> "TFIdeficsCache":
        """With some rows of text only, or in another order, each with its images.

        Args:
            indices: (rows,) integers; they may repeat.
        """
        memory = self.image_memory
        if memory is not None:
            indices = ops.cast(indices, "int32")
            copies = ops.shape(memory.last_mask_BI)[0] // memory.num_rows
            last_mask_BI = ops.take(memory.last_mask_BI, indices, axis=0)
            memory = memory.rows(indices // copies)._replace(last_mask_BI=last_mask_BI)
        return TFIdeficsCache(self._mapped(lambda tensor: ops.take(tensor, indices, axis=0)), memory)

    def spec(self) -> "TFIdeficsCache":
        """A cache of `tf.TensorSpec` for the signature of a `tf.function`: rows, lengths and images are left open."""
        layers = self._mapped(lambda tensor: open_spec(tensor, 0, 2))
        return TFIdeficsCache(layers, None if self.image_memory is None else self.image_memory.spec())

    def _mapped(self, function) -> tuple[LayerCache, ...]:
        return tuple(LayerCache(function(layer.key), function(layer.value)) for layer in self.layers)


def open_spec(tensor, *open_axes: int) -> tf.TensorSpec:
    """What a tensor is, the sizes of some axes left open."""
    return tf.TensorSpec([None if i in open_axes else n for i, n in enumerate(tensor.shape)], tensor.dtype)


def recall_images(cache: TFIdeficsCache | None) -> ImageMemory | None:
    """The image memory of `cache`, or None."""
    return None if cache is None else cache.image_memory
