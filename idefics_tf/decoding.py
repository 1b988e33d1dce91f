"""Next-token logits for a search: the prompt once, then one token after the other, with a cache or without.

Unusual: with a cache a prompt runs once, not per beam; its cache is then repeated. Images are encoded, and their keys
and values made, with the prompt; all steps and all beams read the same ones, and of several images only the one that
is looked at. A decoder keeps what no step changes; what steps change, keys and values of the text, the search carries
along as `memory`. The cache has a fixed size, so that one compiled step serves every position; what lies behind the
filled ones is masked like any later position.

In `idefics_pt` transformers does it. Axes: see `idefics_common`; R rows of text are n for each of B prompts, C
positions fit.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from idefics_tf.cache import LayerCache, TFIdeficsCache
from idefics_tf.image_encoding import encode_images
from idefics_tf.image_masks import seen_images
from idefics_tf.layers import sizes


class Prompt(NamedTuple):
    """Inputs of `generate` in one form; B rows.

    Attributes:
        ids_BT: int32, without columns if there are only embeddings.
        embeddings_BTD: read in place of the ids, or None.
        attention_mask_BS: boolean, over cached positions too.
        images: the images of this call by their keyword, or empty.
        image_mask_BTI: boolean, over all images, for this call's positions or from the start of the text; or None.
        cache: of earlier calls, or None; then ids and mask are over the whole text and the cached part is not read.
    """

    ids_BT: Any
    attention_mask_BS: Any
    embeddings_BTD: Any
    images: dict
    image_mask_BTI: Any
    cache: TFIdeficsCache | None

    @property
    def length(self):
        """Of the ids: a number, or a scalar tensor where the graph does not know it."""
        return sizes(self.ids_BT)[1]

    @property
    def text_length(self):
        """Of what the model reads, cached positions included."""
        return self.length if self.embeddings_BTD is None else sizes(self.embeddings_BTD)[1]


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


class CachedDecoder:
    """Steps that compute one position each, on a cache of fixed size.

    Args:
        model: a `TFIdeficsForVisionText2Text`. rows_per_prompt: adjacent rows of text, its beams or samples.
        capacity: positions that the cache has room for, a number or a scalar tensor.

    Attributes:
        first_logits_RV: of the token after the prompt, float32.
        memory: what `next_logits` takes and gives: keys and values (R, H, C, K) of each layer.
    """

    def __init__(self, model, prompt: Prompt, rows_per_prompt: int, capacity, interpolate_pos_encoding: bool):
        self.model = model
        self.text_length = prompt.text_length
        self.ids_length = prompt.length
        start = 0 if prompt.cache is None else prompt.cache.get_seq_length()
        outputs, logits_BV = _read(
            model,
            input_ids=prompt.ids_BT[:, start:] if prompt.embeddings_BTD is None else None,
            inputs_embeds=None if prompt.embeddings_BTD is None else prompt.embeddings_BTD[:, start:],
            attention_mask=prompt.attention_mask_BS,
            image_attention_mask=prompt.image_mask_BTI,
            past_key_values=prompt.cache,
            use_cache=True,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **prompt.images,
        )
        self.first_logits_RV = _repeated(logits_BV, rows_per_prompt)

        def enlarged(tensor_BHSK):
            missing = capacity - tf.shape(tensor_BHSK)[2]
            padded = tf.pad(tensor_BHSK, ((0, 0), (0, 0), (0, missing), (0, 0)))
            if isinstance(capacity, int):
                padded = tf.ensure_shape(padded, (None, None, capacity, None))
            return _repeated(padded, rows_per_prompt)

        layers = outputs.past_key_values.layers
        self.memory = tuple(LayerCache(enlarged(layer.key), enlarged(layer.value)) for layer in layers)
        self.image_memory = outputs.past_key_values.image_memory
        if self.image_memory is not None:
            # what is generated sees what the end of the mask says, which may reach beyond the prompt
            seen_BSI = tf.concat((self.image_memory.seen_BSI, prompt.image_mask_BTI[:, -1:]), axis=1)
            self.image_memory = self.image_memory._replace(seen_BSI=_repeated(seen_BSI, rows_per_prompt))
        self.images_to_read = None if self.image_memory is None else self.image_memory.narrowed()
        kept_RS = _repeated(prompt.attention_mask_BS, rows_per_prompt)
        self.num_kept_R = tf.reduce_sum(tf.cast(kept_RS, tf.int32), axis=1)
        missing = capacity - tf.shape(kept_RS)[1]
        self.attention_mask_RC = tf.pad(kept_RS, ((0, 0), (0, missing)), constant_values=True)

    def next_logits(self, memory, ids_RC, length):
        """Logits (R, V) of the token after the first `length` ids, and the memory with one position more."""
        generated = length - self.ids_length
        filled = self.text_length + generated - 1
        layers = tuple(StaticLayerCache(*layer, filled) for layer in memory)
        outputs, logits_RV = _read(
            self.model,
            input_ids=tf.gather(ids_RC, (length - 1)[None], axis=1),
            attention_mask=self.attention_mask_RC,
            position_ids=(self.num_kept_R + generated - 1)[:, None],
            past_key_values=TFIdeficsCache(layers, self.images_to_read),
            use_cache=True,
        )
        return logits_RV, tuple(LayerCache(layer.key, layer.value) for layer in outputs.past_key_values.layers)

    def reordered(self, memory, row_R):
        """The memory whose rows are those of `memory` at the indices `row_R`, which stay within their prompt."""
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, row_R), memory)

    def cache(self, memory, length):
        """A cache for a later call, once it is cropped: of all ids but the last, which was chosen but not read.

        Returns:
            the cache with all its room, and how many of its positions are filled.
        """
        return TFIdeficsCache(memory, self.image_memory), self.text_length + length - self.ids_length - 1


class UncachedDecoder:
    """Steps that each read the whole text again; slow, and so simple that it shows what the other one has to give.

    Arguments and attributes as `CachedDecoder`. Images are encoded once here too.
    """

    def __init__(self, model, prompt: Prompt, rows_per_prompt: int, capacity, interpolate_pos_encoding: bool):
        self.model = model
        self.ids_length = prompt.length
        self.images = {}
        for name, images in prompt.images.items():
            seen_BI = seen_images(prompt.image_mask_BTI, sizes(images)[0])
            form = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
            self.images[form], _ = encode_images(model.model, name, images, seen_BI, interpolate_pos_encoding)
        embeddings_BTD = prompt.embeddings_BTD
        if embeddings_BTD is None:
            embeddings_BTD = model.model.embed_tokens(prompt.ids_BT)
        self.embeddings_RTD = _repeated(embeddings_BTD, rows_per_prompt)
        self.attention_mask_RT = _repeated(prompt.attention_mask_BS, rows_per_prompt)
        self.image_mask_RTI = None
        if prompt.image_mask_BTI is not None:
            self.image_mask_RTI = _repeated(prompt.image_mask_BTI, rows_per_prompt)
        ids_RT = _repeated(prompt.ids_BT, rows_per_prompt)
        self.first_logits_RV, self.memory = self.next_logits((), ids_RT, self.ids_length)

    def next_logits(self, memory, ids_RC, length):
        """Logits (R, V) of the token after the first `length` ids."""
        new = length - self.ids_length
        new_RTD = self.model.model.embed_tokens(ids_RC[:, self.ids_length : length])
        mask_RTI = self.image_mask_RTI
        if mask_RTI is not None:
            mask_RTI = tf.concat((mask_RTI, tf.repeat(mask_RTI[:, -1:], new, axis=1)), axis=1)
        _, logits_RV = _read(
            self.model,
            inputs_embeds=tf.concat((self.embeddings_RTD, new_RTD), axis=1),
            attention_mask=tf.pad(self.attention_mask_RT, ((0, 0), (0, new)), constant_values=True),
            image_attention_mask=mask_RTI,
            use_cache=False,
            **self.images,
        )
        return logits_RV, memory

    def reordered(self, memory, row_R):
        """Nothing to do: all there is to know is in the ids."""
        return memory


def _read(model, **inputs):
    """What the model below the head makes of inputs, and float32 logits (rows, V) of the token that follows."""
    outputs = model.model(**inputs, output_attentions=False, output_hidden_states=False)
    return outputs, tf.cast(model.logits_of(outputs.last_hidden_state[:, -1:])[:, 0], tf.float32)


def _repeated(tensor, repeats: int):
    return tensor if repeats == 1 else tf.repeat(tensor, repeats, axis=0)
