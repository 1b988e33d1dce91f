"""What a cache holds: keys and values of the text, layer by layer, and of the images, made once, with who sees them.

Unusual: a cache is a value. A call takes one and hands back another; nothing is changed in place, so it can pass
through `tf.function` and be kept, copied or thrown away like any tensor. Its images have one row per prompt, not per
beam; whatever happens to rows or positions of the text happens to what these saw of the images.

Mirrors `idefics_pt/cache.py`. Axes: see `idefics_common`.
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from idefics_tf.layers import sizes


class ImageMemory(NamedTuple):
    """Images that earlier calls have seen: a tree of tensors.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        seen_BSI: which images each position of the text may see, boolean; the rows are those of the text, beams
            included. Positions behind its last one see what that sees.
        encoded_BI: which images were encoded, boolean; the others could not be seen by anyone and are zeros.
    """

    hidden_states_BILE: Any
    key_values: tuple[tuple[Any, Any], ...]
    seen_BSI: Any
    encoded_BI: Any

    @property
    def num_images(self):
        """Images per row, padding included: a number, or a scalar tensor where the graph does not know it."""
        return ops.shape(self.hidden_states_BILE)[1]

    @property
    def num_rows(self):
        """Rows of images; the rows of text are a multiple of them. A number, or a scalar tensor."""
        return ops.shape(self.hidden_states_BILE)[0]

    def narrowed(self) -> "ImageMemory":
        """The memory of the one image per prompt that the end of its text sees; the whole one, if that of any prompt
        sees several. Of what positions saw, only the end is left.

        A loop asks this once: its steps see what the end of the text sees, and then read no other image.
        """
        rows, num_images, tokens, width = ops.shape(self.hidden_states_BILE)
        _, heads, _, head_width = self.key_values[0][0].shape
        last_B1I = self.seen_BSI[:, -1:]
        seen_BI = ops.any(ops.reshape(last_B1I, (rows, -1, num_images)), axis=1)
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
            return ImageMemory(
                hidden_states_BILE=ops.reshape(states, (rows, 1, tokens, width)),
                key_values=tuple((sole_image(key), sole_image(value)) for key, value in self.key_values),
                seen_BSI=ops.any(last_B1I, axis=2, keepdims=True),
                encoded_BI=ops.expand_dims(ops.take(ops.reshape(self.encoded_BI, (-1,)), index_B), 1),
            )

        looks_at_one = ops.all(ops.sum(ops.cast(seen_BI, "int32"), axis=1) <= 1)
        return tf.cond(looks_at_one, sole, lambda: self._replace(seen_BSI=last_B1I))

    def rows(self, indices) -> "ImageMemory":
        """The memory of other prompts: row i of the result is row ``indices[i]``; indices (rows,) may repeat."""
        positions = sizes(self.seen_BSI)[1]
        by_prompt = ops.reshape(self.seen_BSI, (self.num_rows, -1, positions, self.num_images))
        memory = self._replace(seen_BSI=by_prompt)
        memory = keras.tree.map_structure(lambda tensor: ops.take(tensor, indices, axis=0), memory)
        return memory._replace(seen_BSI=ops.reshape(memory.seen_BSI, (-1, positions, self.num_images)))

    def text_rows(self, indices) -> "ImageMemory":
        """The memory for some rows of text, each with images of its own."""
        indices = ops.cast(indices, "int32")
        rows_per_prompt = ops.shape(self.seen_BSI)[0] // self.num_rows
        return self.rows(indices // rows_per_prompt)._replace(seen_BSI=ops.take(self.seen_BSI, indices, axis=0))

    def images_from(self, start) -> "ImageMemory":
        """The memory without the first `start` images of each row."""
        first = start * self.hidden_states_BILE.shape[2]
        return ImageMemory(
            hidden_states_BILE=self.hidden_states_BILE[:, start:],
            key_values=tuple((key[:, :, first:], value[:, :, first:]) for key, value in self.key_values),
            seen_BSI=self.seen_BSI[:, :, start:],
            encoded_BI=self.encoded_BI[:, start:],
        )

    def spec(self) -> "ImageMemory":
        """See `TFIdeficsCache.spec`."""
        return ImageMemory(
            hidden_states_BILE=open_spec(self.hidden_states_BILE, 0, 1),
            key_values=tuple((open_spec(key, 0, 2), open_spec(value, 0, 2)) for key, value in self.key_values),
            seen_BSI=open_spec(self.seen_BSI, 0, 1, 2),
            encoded_BI=open_spec(self.encoded_BI, 0, 1),
        )


def seen_at_end(seen_BSI, past_length):
    """Which images the last of `past_length` positions may see, boolean (rows, I); none, if there is no position."""
    return ops.any(seen_BSI[:, :past_length][:, -1:], axis=1)


def seen_so_far(seen_BSI, mask_BTI, past_length):
    """`ImageMemory.seen_BSI` after a call: what was seen before, image by image, and then the mask of the call.

    Args:
        seen_BSI: before the call, over any number of images, or None. mask_BTI: over the positions of the call.
        past_length: positions that the cache held before, a number or a scalar tensor.
    """
    rows, _, num_images = sizes(mask_BTI)
    if isinstance(past_length, int) and past_length == 0:
        return mask_BTI
    if seen_BSI is None:
        seen_BSI = ops.zeros((rows, past_length, num_images), dtype="bool")
    held = sizes(seen_BSI)[1]
    if held is not past_length and not (isinstance(held, int) and held == past_length):
        before_BSI = tf.pad(seen_BSI, ((0, 0), (1, 0), (0, 0)))  # a text of no position saw none
        seen_BSI = ops.take(before_BSI, ops.minimum(ops.arange(past_length) + 1, held), axis=1)
    return ops.concatenate((with_images(seen_BSI, num_images), mask_BTI), axis=1)


def with_images(mask, num_images):
    """A boolean mask (..., I) over another number of images: the last ones are left out, or new ones are not seen."""
    if isinstance(num_images, int) and mask.shape[-1] == num_images:
        return mask
    paddings = [(0, 0)] * (len(mask.shape) - 1) + [(0, num_images)]
    return tf.pad(mask, paddings)[..., :num_images]


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
        layers: of each decoder layer: `LayerCache`, or within `generate` `idefics_tf.decoding.StaticLayerCache`.
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
        """With the first `max_length` positions only, or, if that is negative, without that many of the last."""
        known = tf.get_static_value(max_length)
        if known is None:
            max_length = tf.where(max_length < 0, self.get_seq_length() + max_length, max_length)
        else:
            max_length = int(known) if known >= 0 else self.get_seq_length() + int(known)
        memory = self.image_memory
        if isinstance(max_length, int) and max_length <= 0:
            max_length, memory = 0, None
        if memory is not None:
            memory = memory._replace(seen_BSI=memory.seen_BSI[:, :max_length])
        return TFIdeficsCache(self._mapped(lambda tensor: tensor[:, :, :max_length]), memory)

    def reset(self) -> "TFIdeficsCache":
        """Without any position or image."""
        return self.crop(0)

    def batch_repeat_interleave(self, repeats: int) -> "TFIdeficsCache":
        """With each row of text `repeats` times, which share its images."""
        memory = self.image_memory
        if memory is not None:
            memory = memory._replace(seen_BSI=ops.repeat(memory.seen_BSI, repeats, axis=0))
        return TFIdeficsCache(self._mapped(lambda tensor: ops.repeat(tensor, repeats, axis=0)), memory)

    def batch_select_indices(self, indices) -> "TFIdeficsCache":
        """With some rows of text only, or in another order, each with its images.

        Args:
            indices: (rows,) integers; they may repeat.
        """
        memory = None if self.image_memory is None else self.image_memory.text_rows(indices)
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
