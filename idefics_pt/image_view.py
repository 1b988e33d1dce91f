"""How a call looks at images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_tf/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass

import torch

from idefics_pt.cache import ImageMemory, remember_images
from idefics_pt.image_inputs import (
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

    new_BME: torch.Tensor | None = None
    memory: ImageMemory | None = None
    mask_BTM: torch.Tensor | None = None
    gate_BT: torch.Tensor | None = None
    last_mask_BI: torch.Tensor | None = None
    hidden_states_BILE: torch.Tensor | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    perceiver_attentions: tuple[torch.Tensor, ...] | None = None

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        return None if self.memory is None else self.memory.key_values[block]

    def remember_on(self, cache, key_values) -> None:
        """Leave on `cache` what later calls need, given the keys and values (B, H, M, K) of every gated block."""
        if self.gate_BT is None:
            remember_images(cache, None)
        elif self.new_BME is not None:
            remember_images(cache, ImageMemory(self.hidden_states_BILE, key_values, self.last_mask_BI))
        elif not torch.compiler.is_compiling():
            self.memory.last_mask_BI = self.last_mask_BI


class ImageEncoderMixin:
    """The image side of `IdeficsModel`, on its `config`, `vision_model` and, if configured, `perceiver_resampler`."""

    def encode_images(self, pixel_values, interpolate_pos_encoding=False):
        """Encode images once, for any number of later calls.

        Args:
            pixel_values: (B, I, C, height, width), as the processor makes them.
            interpolate_pos_encoding: allow other sizes than the model's.

        Returns:
            (B, I, L, E): pass it as `perceiver_embeddings` if the model has a resampler, else, (B, I, P, E), as
            `image_encoder_embeddings`.
        """
        self._check_images("pixel_values", pixel_values, rows=len(pixel_values))
        return self._encode_images("pixel_values", pixel_values, None, interpolate_pos_encoding, {})

    def look(self, given, mask, memory, input_ids, past_length, text_shape, interpolate_pos_encoding, with_attentions):
        """Make the `ImageView` of a call from the images given with it and those that its cache has seen."""
        rows, length = text_shape
        name, images = given or (None, None)
        num_old = 0 if memory is None else memory.num_images
        num_new = 0 if given is None else images.shape[1]
        if given is not None:
            self._check_images(name, images, rows)

        def default_mask():
            if given is None:
                return memory.last_mask_BI.unsqueeze(1).expand(-1, length, -1)
            image_token_id = getattr(self.config, "image_token_id", None)
            if image_token_id is None or input_ids is None:
                return torch.ones((rows, length, num_old + num_new), dtype=torch.bool, device=self._device_of(images))
            if num_old:
                raise ValueError(
                    "New images for a cache that has seen some need an image_attention_mask over all of them."
                )
            return mask_from_tokens(input_ids, image_token_id, self.config.eos_token_id, num_new)

        mask_BTI, is_new = settle_mask(mask, num_old, num_new, rows, default_mask)
        if mask_BTI is None:
            return ImageView()
        states_BILE = None if memory is None else memory.hidden_states_BILE
        new_BILE, recorded = None, {}
        if is_new:
            # a later call may show what this one does not yet, so what is seen is asked of the whole mask
            seen_BI = seen_images(mask_BTI[..., num_old:], images.shape[0])
            new_BILE = self._encode_images(name, images, seen_BI, interpolate_pos_encoding, recorded)
            if new_BILE is None:
                zeros_BILE = self._empty_states(name, images)
                if memory is None:
                    return ImageView(hidden_states_BILE=zeros_BILE)
                new_BILE = zeros_BILE
            states_BILE = new_BILE if memory is None else torch.cat((states_BILE, new_BILE), dim=1)
        mask_BTI = mask_of_call(mask_BTI, past_length, length)
        mask_BTM, gate_BT = attendable(mask_BTI, states_BILE.shape[2])
        return ImageView(
            new_BME=None if new_BILE is None else new_BILE.flatten(1, 2),
            memory=memory,
            mask_BTM=mask_BTM,
            gate_BT=gate_BT,
            last_mask_BI=mask_BTI[:, -1],
            hidden_states_BILE=states_BILE,
            **(recorded if with_attentions else {}),
        )

    def _check_images(self, name, images, rows):
        dimensions = {"pixel_values": 5}.get(name, 4)
        if images.dim() != dimensions or images.shape[0] == 0 or rows % images.shape[0]:
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

    def _encode_images(self, name, images, seen_BI, interpolate_pos_encoding, recorded):
        """Take images the rest of the way from the form `name`; attention weights go to the dict `recorded`."""

        def encode(flat):
            if name == "pixel_values":
                vision = self.vision_model(flat, interpolate_pos_encoding, output_attentions=True)
                flat, recorded["vision_attentions"] = vision.last_hidden_state, vision.attentions
            if name != "perceiver_embeddings" and self.config.use_resampler:
                flat, recorded["perceiver_attentions"] = self.perceiver_resampler(flat)
            return flat

        images = images.to(self._device_of(images), self.dtype)
        return encode_seen(encode, images, seen_BI, keep_one=self.training)

    def _empty_states(self, name, images):
        if name == "pixel_values":
            patch = self.config.vision_config.patch_size
            tokens = (images.shape[-2] // patch) * (images.shape[-1] // patch) + 1
        else:
            tokens = images.shape[2]
        if self.config.use_resampler:
            tokens = self.config.perceiver_config.resampler_n_latents
        width = self.config.vision_config.embed_dim
        return torch.zeros((*images.shape[:2], tokens, width), dtype=self.dtype, device=self._device_of(images))

    def _device_of(self, images):
        """Where to compute with `images`: where the model is, unless its parameters are offloaded and only come there
        when they are used."""
        return images.device if self.device.type == "meta" else self.device
