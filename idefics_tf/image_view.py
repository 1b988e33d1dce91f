"""How a call looks at images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_pt/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from keras import ops

from idefics_tf.cache import ImageMemory
from idefics_tf.image_inputs import (
    are_known,
    attendable,
    encode_seen,
    is_zero,
    mask_from_tokens,
    mask_of_call,
    seen_images,
    settle_mask,
)
from idefics_tf.layers import sizes


@dataclass
class ImageView:
    """What one call sees of images; all fields are None in a call without any.

    Attributes:
        new_BME: states of images whose keys and values have to be made, side by side; None if there are none.
        memory: images that the cache has seen, which come before the new ones.
        mask_BTM: boolean, which image memory each position may attend to, see `attendable`.
        gate_BT: boolean, whether each position may see any image.
        hidden_states_BILE: states of all images so far, for the output and for later calls.
        remembered: what is to be remembered, all but `hidden_states_BILE` and the keys and values.
        vision_attentions, perceiver_attentions: weights of the layers of the two image modules, if they were asked for
            and images went through the module in this call.
    """

    new_BME: Any = None
    memory: ImageMemory | None = None
    mask_BTM: Any = None
    gate_BT: Any = None
    hidden_states_BILE: Any = None
    remembered: dict = field(default_factory=dict)
    vision_attentions: tuple | None = None
    perceiver_attentions: tuple | None = None

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        return None if self.memory is None else self.memory.key_values[block]

    def memory_with(self, key_values) -> ImageMemory | None:
        """What later calls need, given the keys and values (B, H, M, K) of every gated block."""
        if self.gate_BT is None:
            return None
        return ImageMemory(self.hidden_states_BILE, tuple(key_values), **self.remembered)


@dataclass
class SettledImages:
    """The images and the image mask of a call, brought into one form.

    Attributes:
        mask_BTI: boolean, over the images of the memory and then the given ones; None if there are no images.
        is_new: whether the given images are to be encoded.
        images: the given ones, their rows repeated where the memory has more.
        memory: of earlier calls, its rows repeated where more are given; None if it is of no use.
        encoded_BI: which of the given images earlier calls saw and remembered, if these are encoded anew; or None.
    """

    mask_BTI: Any
    is_new: bool
    images: Any = None
    memory: ImageMemory | None = None
    encoded_BI: Any = None


class ImageEncoderMixin:
    """The image side of `TFIdeficsModel`, on its `config`, `vision_model` and, if configured, `perceiver_resampler`."""

    def encode_images(self, pixel_values, image_attention_mask=None, interpolate_pos_encoding=False):
        """Encode images once, for any number of later calls.

        Args:
            pixel_values: (B, I, C, height, width), as the processor makes them.
            image_attention_mask: (B, T, I), as the processor makes it; images that no position may see (padding) are
                then not encoded, and their features are zero. By default all are.
            interpolate_pos_encoding: allow other sizes than the model's.

        Returns:
            (B, I, L, E): pass it as `perceiver_embeddings` if the model has a resampler, else, (B, I, P, E), as
            `image_encoder_embeddings`.
        """
        pixel_values = ops.cast(pixel_values, self.compute_dtype)
        rows, seen_BI = sizes(pixel_values)[0], None
        self._check_images("pixel_values", pixel_values, rows)
        if image_attention_mask is not None:
            seen_BI = seen_images(ops.not_equal(image_attention_mask, 0), rows)
        states_BILE = self._encode_images("pixel_values", pixel_values, seen_BI, interpolate_pos_encoding, None, False)
        return self._empty_states("pixel_values", pixel_values) if states_BILE is None else states_BILE

    def look(
        self,
        given,
        mask,
        memory,
        input_ids,
        past_length,
        text_shape,
        interpolate_pos_encoding,
        with_attentions,
        training,
    ):
        """Make the `ImageView` of a call from the images given with it and those that its cache has seen."""
        _, length = text_shape
        before = still_valid(memory, past_length)
        settled = self.settle_images(given, mask, before, input_ids, past_length, text_shape)
        if settled.mask_BTI is None:
            return ImageView()
        name, images, memory, mask_BTI = given and given[0], settled.images, settled.memory, settled.mask_BTI
        states_BILE = None if memory is None else memory.hidden_states_BILE
        new_BILE, recorded = None, {} if with_attentions else None
        if settled.is_new:
            # a later call may show what this one does not yet, so what is seen is asked of the whole mask
            new_mask_BTI = mask_BTI if memory is None else mask_BTI[..., memory.num_images :]
            seen_BI = seen_images(new_mask_BTI, sizes(images)[0])
            if settled.encoded_BI is not None:
                seen_BI = ops.logical_or(seen_BI, settled.encoded_BI)
            new_BILE = self._encode_images(name, images, seen_BI, interpolate_pos_encoding, recorded, training)
            if new_BILE is None:
                new_BILE = self._empty_states(name, images)
                if memory is None:
                    return ImageView(hidden_states_BILE=new_BILE)
            if memory is not None and states_BILE.shape[2:] != new_BILE.shape[2:]:
                raise ValueError(
                    f"The new images have {new_BILE.shape[2]} tokens each, those that the cache has seen "
                    f"{states_BILE.shape[2]}; without a resampler all images of a text must have one size."
                )
            states_BILE = new_BILE if memory is None else ops.concatenate((states_BILE, new_BILE), axis=1)
        whole_mask_BTI, mask_BTI = mask_BTI, mask_of_call(mask_BTI, past_length, length)
        if not settled.is_new and not are_known(past_length):
            # a cache that was emptied has no text that saw its images
            mask_BTI = ops.logical_and(mask_BTI, past_length > 0)
        mask_BTM, gate_BT = attendable(mask_BTI, states_BILE.shape[2])
        remembered = {"last_mask_BI": mask_BTI[:, -1]}
        remembered["mask_start_B"] = _mask_start(mask_BTI, past_length, length, sizes(states_BILE)[0])
        if settled.is_new:
            remembered |= _origin(memory, name, images, seen_BI, whole_mask_BTI, past_length, length)
        else:
            kept = ("encoded_BI", "sources", "first_seen_B", "text_length_B")
            remembered |= {name: getattr(memory, name) for name in kept}
            # after text that saw the same, what this call sees began there; its rows are those of the cache as given
            is_same_BT = _by_prompt(before.last_mask_BI[:, None] == mask_BTI, memory.num_rows)
            is_same_B = ops.all(is_same_BT, axis=1) & (past_length > memory.mask_start_B)
            remembered["mask_start_B"] = ops.where(is_same_B, memory.mask_start_B, remembered["mask_start_B"])
        return ImageView(
            new_BME=None if new_BILE is None else _side_by_side(new_BILE),
            memory=memory,
            mask_BTM=mask_BTM,
            gate_BT=gate_BT,
            hidden_states_BILE=states_BILE,
            remembered=remembered,
            **(recorded or {}),
        )

    def settle_images(self, given, mask, memory, input_ids, past_length, text_shape) -> SettledImages:
        """Hold the images of a call against those that its cache has seen, and against the image mask.

        Args:
            given: (name, tensor) of the images given with this call, or None. memory: images that the cache has seen.
            mask: (B, T, I) of any dtype, or None; then the default one is made. past_length: positions that the cache
                holds. text_shape: (B, T) of this call.

        Raises:
            ValueError: if they contradict each other.
        """
        rows, _ = text_shape
        name, images = given or (None, None)
        if given is not None:
            self._check_images(name, images, rows)
        if memory is not None and are_known(rows, memory.num_rows) and rows % memory.num_rows:
            raise ValueError(
                f"The cache has seen the images of {memory.num_rows} prompts; {rows} rows of text do not fit."
            )
        encoded_BI = None
        if memory is not None and given is not None:
            memory, images = _with_equal_rows(memory, name, images)
            if mask is not None and len(mask.shape) == 3 and not tf.executing_eagerly():
                memory, encoded_BI = _unless_given_again(memory, sizes(images)[1], sizes(mask)[2])
        num_old = 0 if memory is None else memory.num_images
        num_new = 0 if given is None else sizes(images)[1]
        mask_BTI, is_new = settle_mask(
            mask,
            num_old,
            num_new,
            rows,
            lambda: self._default_mask(images, memory, input_ids, past_length, text_shape),
            lambda: memory.holds(name, images),
        )
        if memory is not None and mask_BTI is not None and tf.executing_eagerly():
            seen_BI = seen_images(mask_BTI[..., :num_old], memory.num_rows)
            if bool(ops.any(ops.logical_and(seen_BI, ops.logical_not(memory.encoded_BI)))):
                if given is None or is_new:
                    raise ValueError(
                        "image_attention_mask lets text see images that no earlier call could see, so they were not "
                        "encoded; give all images again with this call."
                    )
                memory, encoded_BI, is_new = None, memory.encoded_BI, True
        return SettledImages(mask_BTI, is_new, images, memory, encoded_BI)

    def _default_mask(self, images, memory, input_ids, past_length, text_shape):
        """The mask of a call that brings none: what the text before saw, or what the image tokens say, or all."""
        rows, length = text_shape
        if images is None:
            if tf.executing_eagerly() and int(past_length) <= int(ops.max(memory.mask_start_B)):
                raise ValueError(
                    f"The cache was cropped to {int(past_length)} positions: give image_attention_mask, which says "
                    "what the text from there on sees."
                )
            return ops.repeat(ops.expand_dims(memory.last_mask_BI, 1), length, axis=1)
        if memory is not None:
            raise ValueError("New images for a cache that has seen some need an image_attention_mask over all of them.")
        num_images = sizes(images)[1]
        image_token_id = getattr(self.config, "image_token_id", None)
        if image_token_id is None or input_ids is None:
            return ops.ones((rows, length, num_images), dtype="bool")
        return mask_from_tokens(input_ids, image_token_id, self.config.eos_token_id, num_images)

    def _check_images(self, name, images, rows):
        dimensions = {"pixel_values": 5}.get(name, 4)
        image_rows = images.shape[0]
        if len(images.shape) != dimensions or (are_known(rows, image_rows) and (image_rows == 0 or rows % image_rows)):
            axes = (
                "(batch, num_images, channels, height, width)"
                if dimensions == 5
                else "(batch, num_images, tokens, width)"
            )
            raise ValueError(
                f"{name} must have shape {axes} with a batch that divides the {rows} rows of text, "
                f"got {tuple(images.shape)}."
            )
        width = self.config.vision_config.embed_dim
        if name != "pixel_values" and images.shape[-1] != width:
            raise ValueError(f"{name} must have the vision tower's width {width}, got {images.shape[-1]}.")
        if name == "perceiver_embeddings" and not self.config.use_resampler:
            raise ValueError(
                "perceiver_embeddings were given, but the model has no resampler (use_resampler is False)."
            )

    def _encode_images(self, name, images, seen_BI, interpolate_pos_encoding, recorded, training):
        """Take images the rest of the way from the form `name`; attention weights go to the dict `recorded`, if any."""

        def encode(flat):
            if name == "pixel_values":
                vision = self.vision_model(
                    flat,
                    interpolate_pos_encoding=interpolate_pos_encoding,
                    output_attentions=recorded is not None,
                )
                flat = vision.last_hidden_state
                if recorded is not None:
                    recorded["vision_attentions"] = vision.attentions
            if name != "perceiver_embeddings" and self.config.use_resampler:
                flat, attentions = self.perceiver_resampler(flat)
                if recorded is not None:
                    recorded["perceiver_attentions"] = attentions
            return flat

        return encode_seen(encode, images, seen_BI, keep_one=training)

    def _empty_states(self, name, images):
        if name == "pixel_values":
            patch = self.config.vision_config.patch_size
            tokens = (images.shape[-2] // patch) * (images.shape[-1] // patch) + 1
        else:
            tokens = images.shape[2]
        if self.config.use_resampler:
            tokens = self.config.perceiver_config.resampler_n_latents
        width = self.config.vision_config.embed_dim
        return ops.zeros((*sizes(images)[:2], tokens, width), dtype=self.compute_dtype)


def _side_by_side(states_BILE):
    rows, num_images, tokens, width = sizes(states_BILE)
    return ops.reshape(states_BILE, (rows, num_images * tokens, width))


def still_valid(memory, past_length):
    """The image memory of a cache, unless the cache was emptied or cropped to text that saw none of its images.

    A graph, which cannot tell, keeps it.
    """
    if memory is None or is_zero(past_length):
        return None
    if not tf.executing_eagerly():
        return memory
    past_length = int(past_length)
    is_shorter = past_length < int(ops.max(memory.text_length_B))
    return None if is_shorter and past_length <= int(ops.min(memory.first_seen_B)) else memory


def _with_equal_rows(memory, name, images):
    """Repeat the rows of remembered images, or of new ones, where one is a multiple of the other."""
    old, new = memory.num_rows, sizes(images)[0]
    if are_known(old, new):
        if max(old, new) % min(old, new):
            raise ValueError(f"{name} has {new} rows, but the cache has seen the images of {old} prompts.")
        if old == new:
            return memory, images
    memory = memory.rows(ops.repeat(ops.arange(old), ops.maximum(new // old, 1)))
    return memory, ops.repeat(images, ops.maximum(old // new, 1), axis=0)


def _unless_given_again(memory, num_new, covered):
    """In a graph: the memory, but for its images if the mask covers the given ones alone; and what it had encoded then.

    A graph cannot compare images. Encoding them again is right whatever they are.
    """
    num_old = memory.num_images
    if are_known(num_old, num_new, covered):
        is_again, had_encoded = covered == num_new, memory.encoded_BI if num_old == num_new else None
        return (None, had_encoded) if is_again else (memory, None)
    is_again = tf.equal(covered, num_new)
    encoded_BI = tf.cond(
        tf.logical_and(is_again, tf.equal(num_old, num_new)),
        lambda: memory.encoded_BI,
        lambda: tf.zeros((memory.num_rows, num_new), tf.bool),
    )
    return memory.images_from(tf.where(is_again, num_old, 0)), encoded_BI


def _by_prompt(is_so_RTI, rows):
    """Whether something is so for all images and all rows of text of each of `rows` prompts, boolean (B, T)."""
    _, length, num_images = sizes(is_so_RTI)
    return ops.all(ops.reshape(is_so_RTI, (rows, -1, length, num_images)), axis=(1, 3))


def _mask_start(mask_BTI, past_length, length, rows):
    """The first position of a call from which on all of each of `rows` prompts see what the last sees, int32 (B,)."""
    is_other_BT = ops.logical_not(_by_prompt(mask_BTI == mask_BTI[:, -1:], rows))
    in_call_B = ops.max(ops.where(is_other_BT, ops.arange(1, length + 1, dtype="int32"), 0), axis=1)
    return ops.cast(past_length + in_call_B, "int32")


def _origin(memory, name, images, seen_BI, whole_mask_BTI, past_length, length):
    """The fields of an `ImageMemory` that say where its images came from, after new ones were added."""
    rows = sizes(seen_BI)[0]
    _, covered, num_images = sizes(whole_mask_BTI)
    seeing_BT = ops.any(ops.reshape(whole_mask_BTI, (rows, -1, covered, num_images)), axis=(1, 3))
    offset = ops.where(covered > length, 0, past_length)
    end = past_length + length
    first_seen_B = ops.where(ops.any(seeing_BT, axis=1), offset + ops.argmax(seeing_BT, axis=1), end)
    encoded_BI, sources = seen_BI, {name: images}
    if memory is not None:
        first_seen_B = ops.minimum(first_seen_B, memory.first_seen_B)
        encoded_BI = ops.concatenate((memory.encoded_BI, seen_BI), axis=1)
        known = memory.sources.get(name)
        is_alike = known is not None and known.shape[2:] == images.shape[2:]
        sources = {name: ops.concatenate((known, images), axis=1)} if is_alike else {}
    return {
        "encoded_BI": encoded_BI,
        "sources": sources,
        "first_seen_B": ops.cast(first_seen_B, "int32"),
        "text_length_B": ops.full((rows,), end, dtype="int32"),
    }
