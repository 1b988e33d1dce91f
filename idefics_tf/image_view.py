"""How a call looks at images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_pt/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass
from typing import Any

from keras import ops

from idefics_tf.cache import ImageMemory
from idefics_tf.image_inputs import (
    attendable,
    encode_seen,
    mask_from_tokens,
    mask_of_call,
    seen_images,
    settle_mask,
)


@dataclass
class ImageView:
    """What one call sees of images; all fields are None in a call without any.

    Attributes:
        new_BME: states of images whose keys and values have to be made, side by side; None if there are none.
        memory: images that the cache has seen, which come before the new ones.
        mask_BTM: boolean, which image memory each position may attend to, see `attendable`.
        gate_BT: boolean, whether each position may see any image.
        last_mask_BI: boolean, which images the last position may see.
        hidden_states_BILE: states of all images so far, for the output and for later calls.
        vision_attentions, perceiver_attentions: weights of the layers of the two image modules, if they were asked for
            and images went through the module in this call.
    """

    new_BME: Any = None
    memory: ImageMemory | None = None
    mask_BTM: Any = None
    gate_BT: Any = None
    last_mask_BI: Any = None
    hidden_states_BILE: Any = None
    vision_attentions: tuple | None = None
    perceiver_attentions: tuple | None = None

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        return None if self.memory is None else self.memory.key_values[block]

    def memory_with(self, key_values) -> ImageMemory | None:
        """What later calls need, given the keys and values (B, H, M, K) of every gated block."""
        if self.gate_BT is None:
            return None
        return ImageMemory(self.hidden_states_BILE, tuple(key_values), self.last_mask_BI)


class ImageEncoderMixin:
    """The image side of `TFIdeficsModel`, on its `config`, `vision_model` and, if configured, `perceiver_resampler`."""

    def encode_images(self, pixel_values, interpolate_pos_encoding=False):
        """Encode images once, for any number of later calls.

        Args:
            pixel_values: (B, I, C, height, width), as the processor makes them.
            interpolate_pos_encoding: allow other sizes than the model's.

        Returns:
            (B, I, L, E): pass it as `perceiver_embeddings` if the model has a resampler, else, (B, I, P, E), as
            `image_encoder_embeddings`.
        """
        pixel_values = ops.convert_to_tensor(pixel_values)
        self._check_images("pixel_values", pixel_values, rows=ops.shape(pixel_values)[0])
        return self._encode_images("pixel_values", pixel_values, None, interpolate_pos_encoding, None, training=False)

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
        name, images = given or (None, None)
        num_old = 0 if memory is None else memory.num_images
        mask_BTI, is_new = self.settle_image_mask(given, mask, memory, input_ids, text_shape)
        if mask_BTI is None:
            return ImageView()
        states_BILE = None if memory is None else memory.hidden_states_BILE
        new_BILE, recorded = None, {} if with_attentions else None
        if is_new:
            # a later call may show what this one does not yet, so what is seen is asked of the whole mask
            seen_BI = seen_images(mask_BTI[..., num_old:], ops.shape(images)[0])
            new_BILE = self._encode_images(name, images, seen_BI, interpolate_pos_encoding, recorded, training)
            if new_BILE is None:
                zeros_BILE = self._empty_states(name, images)
                if memory is None:
                    return ImageView(hidden_states_BILE=zeros_BILE)
                new_BILE = zeros_BILE
            states_BILE = new_BILE if memory is None else ops.concatenate((states_BILE, new_BILE), axis=1)
        mask_BTI = mask_of_call(mask_BTI, past_length, length)
        mask_BTM, gate_BT = attendable(mask_BTI, states_BILE.shape[2])
        return ImageView(
            new_BME=None if new_BILE is None else _side_by_side(new_BILE),
            memory=memory,
            mask_BTM=mask_BTM,
            gate_BT=gate_BT,
            last_mask_BI=mask_BTI[:, -1],
            hidden_states_BILE=states_BILE,
            **(recorded or {}),
        )

    def settle_image_mask(self, given, mask, memory, input_ids, text_shape):
        """The image mask of a call and whether its images are new, see `settle_mask`; without a mask, the default one.

        Args:
            given: (name, tensor) of the images given with this call, or None. memory: images that the cache has seen.
            mask: (B, T, I) of any dtype, or None. text_shape: (B, T) of this call.
        """
        rows, length = text_shape
        num_old = 0 if memory is None else memory.num_images
        num_new = 0
        if given is not None:
            self._check_images(*given, rows)
            num_new = ops.shape(given[1])[1]

        def default_mask():
            if given is None:
                return ops.repeat(ops.expand_dims(memory.last_mask_BI, 1), length, axis=1)
            image_token_id = getattr(self.config, "image_token_id", None)
            if image_token_id is None or input_ids is None:
                return ops.ones((rows, length, num_old + num_new), dtype="bool")
            if memory is not None:
                raise ValueError(
                    "New images for a cache that has seen some need an image_attention_mask over all of them."
                )
            return mask_from_tokens(input_ids, image_token_id, self.config.eos_token_id, num_new)

        return settle_mask(mask, num_old, num_new, rows, default_mask)

    def _check_images(self, name, images, rows):
        dimensions = {"pixel_values": 5}.get(name, 4)
        image_rows = images.shape[0]
        known = isinstance(rows, int) and image_rows is not None
        if len(images.shape) != dimensions or (known and (image_rows == 0 or rows % image_rows)):
            axes = (
                "(batch, num_images, channels, height, width)"
                if dimensions == 5
                else "(batch, num_images, tokens, width)"
            )
            raise ValueError(
                f"{name} must have shape {axes} with a batch that divides the {rows} rows of text, "
                f"got {tuple(images.shape)}."
            )
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

        images = ops.cast(images, self.compute_dtype)
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
        return ops.zeros((*ops.shape(images)[:2], tokens, width), dtype=self.compute_dtype)


def _side_by_side(states_BILE):
    rows, num_images, tokens, width = ops.shape(states_BILE)
    return ops.reshape(states_BILE, (rows, num_images * tokens, width))
