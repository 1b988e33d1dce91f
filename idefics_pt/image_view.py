"""How a call looks at images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_tf/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, field

import torch

from idefics_pt.cache import ImageMemory, remember_images
from idefics_pt.image_inputs import (
    attendable,
    encode_seen,
    mask_from_tokens,
    mask_of_call,
    seen_images,
    settle_mask,
    sole_images,
)


@dataclass
class ImageView:
    """What one call sees of images; all fields are None in a call without any.

    Attributes:
        new_BME: states of images whose keys and values have to be made, side by side; None if there are none.
        memory: images that the cache has seen, which come before the new ones.
        narrowed: keys and values of each gated block for the one remembered image that each row looks at, if that is
            all that this call needs.
        mask_BTM: boolean, which image memory each position may attend to, see `attendable`.
        gate_BT: boolean, whether each position may see any image.
        hidden_states_BILE: states of all images so far, for the output and for later calls.
        remembered: what is to be remembered, all but `hidden_states_BILE` and the keys and values.
        vision_attentions, perceiver_attentions: weights of the layers of the two image modules, if they were asked for
            and images went through the module in this call.
    """

    new_BME: torch.Tensor | None = None
    memory: ImageMemory | None = None
    narrowed: list | None = None
    mask_BTM: torch.Tensor | None = None
    gate_BT: torch.Tensor | None = None
    hidden_states_BILE: torch.Tensor | None = None
    remembered: dict = field(default_factory=dict)
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    perceiver_attentions: tuple[torch.Tensor, ...] | None = None

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        if self.narrowed is not None:
            return self.narrowed[block]
        return None if self.memory is None else self.memory.key_values[block]

    def remember_on(self, cache, key_values) -> None:
        """Leave on `cache` what later calls need, given the keys and values (B, H, M, K) of every gated block."""
        memory = None
        if self.narrowed is not None:
            key_values = self.memory.key_values
        if self.gate_BT is not None:
            memory = ImageMemory(self.hidden_states_BILE, key_values, **self.remembered)
            is_static = getattr(cache, "is_compileable", False) and not torch.compiler.is_compiling()
            if self.new_BME is not None and is_static:
                memory.mark_static()
        remember_images(cache, memory)


class ImageEncoderMixin:
    """The image side of `IdeficsModel`, on its `config`, `vision_model` and, if configured, `perceiver_resampler`."""

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
        self._check_images("pixel_values", pixel_values, rows=len(pixel_values))
        seen_BI = None if image_attention_mask is None else seen_images(image_attention_mask != 0, len(pixel_values))
        states_BILE = self._encode_images("pixel_values", pixel_values, seen_BI, interpolate_pos_encoding, {})
        return self._empty_states("pixel_values", pixel_values) if states_BILE is None else states_BILE

    def look(self, given, mask, memory, input_ids, past_length, text_shape, interpolate_pos_encoding, with_attentions):
        """Make the `ImageView` of a call from the images given with it and those that its cache has seen."""
        rows, length = text_shape
        may_ask = _may_ask(past_length, is_step=given is None and length == 1)
        before = memory = _still_valid(memory, past_length) if may_ask else memory
        name, images = given or (None, None)
        if given is not None:
            self._check_images(name, images, rows)
        if memory is not None and rows % memory.num_rows:
            raise ValueError(
                f"The cache has seen the images of {memory.num_rows} prompts; {rows} rows of text do not fit."
            )
        if memory is not None and given is not None:
            if torch.compiler.is_compiling() and mask is not None and mask.shape[2] == images.shape[1]:
                memory = None  # a graph cannot compare images; encoding these again is right whatever they are
            else:
                memory, images = _with_equal_rows(memory, name, images)
        num_old = 0 if memory is None else memory.num_images
        num_new = 0 if given is None else images.shape[1]
        mask_BTI, is_new = settle_mask(
            mask,
            num_old,
            num_new,
            rows,
            lambda: self._default_mask(images, memory, input_ids, past_length, (rows, length), may_ask),
            lambda: memory.holds(name, images),
        )
        if mask_BTI is None:
            return ImageView()
        encoded_BI, also_BI = None if memory is None else memory.encoded_BI, None
        if encoded_BI is not None and not torch.compiler.is_compiling():
            seen_BI = seen_images(mask_BTI[..., :num_old], memory.num_rows)
            if _sees_more(seen_BI, encoded_BI, length):
                if given is None or is_new:
                    raise ValueError(
                        "image_attention_mask lets text see images that no earlier call could see, so they were not "
                        "encoded; give all images again with this call."
                    )
                memory, num_old, is_new, also_BI = None, 0, True, encoded_BI

        states_BILE = None if memory is None else memory.hidden_states_BILE
        new_BILE, recorded = None, {}
        if is_new:
            # a later call may show what this one does not yet, so what is seen is asked of the whole mask
            seen_BI = seen_images(mask_BTI[..., num_old:], images.shape[0])
            seen_BI = seen_BI if also_BI is None else seen_BI | also_BI
            new_BILE = self._encode_images(name, images, seen_BI, interpolate_pos_encoding, recorded)
            if new_BILE is None:
                new_BILE = self._empty_states(name, images)
                if memory is None:
                    return ImageView(hidden_states_BILE=new_BILE)
            if memory is not None and states_BILE.shape[2:] != new_BILE.shape[2:]:
                raise ValueError(
                    f"The new images have {new_BILE.shape[2]} tokens each, those that the cache has seen "
                    f"{states_BILE.shape[2]}; without a resampler all images of a text must have one size."
                )
            states_BILE = new_BILE if memory is None else torch.cat((states_BILE, new_BILE), dim=1)
        whole_mask_BTI, mask_BTI = mask_BTI, mask_of_call(mask_BTI, past_length, length)
        if not may_ask and not is_new:
            # a static cache that was emptied has no text that saw its images
            mask_BTI = mask_BTI & (past_length > 0)
        mask_start = _mask_start(None if is_new else before, mask, mask_BTI, past_length)
        remembered, narrowed = {"last_mask_BI": mask_BTI[:, -1], "mask_start": mask_start}, None
        if not is_new and self.config._attn_implementation != "eager":
            sole_B = sole_images(mask_BTI, memory.num_rows)
            if sole_B is not None:
                narrowed = memory.narrowed(sole_B)
                mask_BTI = mask_BTI.any(dim=2, keepdim=True)
        mask_BTM, gate_BT = attendable(mask_BTI, states_BILE.shape[2])
        if is_new:
            remembered |= _origin(memory, name, images, seen_BI, whole_mask_BTI, past_length, length)
        elif memory is not None:
            kept = ("encoded_BI", "sources", "first_seen", "text_length")
            remembered |= {name: getattr(memory, name) for name in kept}
        return ImageView(
            new_BME=None if new_BILE is None else new_BILE.flatten(1, 2),
            memory=memory,
            narrowed=narrowed,
            mask_BTM=mask_BTM,
            gate_BT=gate_BT,
            hidden_states_BILE=states_BILE,
            remembered=remembered,
            **(recorded if with_attentions else {}),
        )

    def _default_mask(self, images, memory, input_ids, past_length, text_shape, may_ask):
        """The mask of a call that brings none: what the text before saw, or what the image tokens say, or all."""
        rows, length = text_shape
        if images is None:
            if may_ask and not torch.compiler.is_compiling() and not _is_last_mask_of(memory, past_length):
                raise ValueError(
                    f"The cache was cropped to {int(past_length)} positions: give image_attention_mask, which says "
                    "what the text from there on sees."
                )
            last_BI = memory.last_mask_BI
            return last_BI.repeat_interleave(rows // len(last_BI), dim=0).unsqueeze(1).expand(-1, length, -1)
        if memory is not None:
            raise ValueError("New images for a cache that has seen some need an image_attention_mask over all of them.")
        image_token_id = getattr(self.config, "image_token_id", None)
        if image_token_id is None or input_ids is None:
            shape = (rows, length, images.shape[1])
            return torch.ones(shape, dtype=torch.bool, device=self._device_of(images))
        return mask_from_tokens(input_ids, image_token_id, self.config.eos_token_id, images.shape[1])

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
        width = self.config.vision_config.embed_dim
        if name != "pixel_values" and images.shape[-1] != width:
            raise ValueError(f"{name} must have the vision tower's width {width}, got {images.shape[-1]}.")
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


def _may_ask(past_length, is_step: bool) -> bool:
    """Whether the length of the text in a cache, a tensor in static ones, is at hand: not while a graph is captured,
    nor in one-token steps on an accelerator, which would stop for the answer."""
    if not isinstance(past_length, torch.Tensor):
        return True
    return not torch.compiler.is_compiling() and not (is_step and past_length.device.type != "cpu")


def _still_valid(memory, past_length):
    """The image memory of a cache, unless the cache was emptied or cropped to text that saw none of its images."""
    if memory is None:
        return None
    if isinstance(past_length, torch.Tensor):
        past_length = int(past_length)
    is_shorter = past_length < memory.text_length
    return None if past_length == 0 or (is_shorter and past_length <= memory.first_seen) else memory


def _is_last_mask_of(memory, past_length) -> bool:
    """Whether the last of the positions that a cache holds saw what the memory's last mask says, as far as is known."""
    return memory.mask_start is None or int(past_length) > memory.mask_start


def _mask_start(memory, given_mask, mask_BTI, past_length) -> int | None:
    """`ImageMemory.mask_start` after a call with the image mask `mask_BTI`, which is `given_mask` or a default.

    Without the `memory` of text that saw the same images, it lies in this call. As in `_sees_more`, one-token steps do
    not ask an accelerator.
    """
    if torch.compiler.is_compiling() or mask_BTI.is_meta or (memory is not None and memory.mask_start is None):
        return None
    if memory is not None and given_mask is None:
        return memory.mask_start
    rows, length, _ = mask_BTI.shape
    if length == 1 and mask_BTI.device.type != "cpu":
        return None
    last_B1I, start = mask_BTI[:, -1:], int(past_length)
    others = (mask_BTI != last_B1I).any(dim=2).any(dim=0).nonzero()
    if len(others):
        return start + int(others[-1]) + 1
    if memory is None or rows % len(memory.last_mask_BI) or not _is_last_mask_of(memory, start):
        return start
    known_BI = memory.last_mask_BI.repeat_interleave(rows // len(memory.last_mask_BI), dim=0)
    return memory.mask_start if torch.equal(known_BI, last_B1I[:, 0]) else start


def _with_equal_rows(memory, name, images):
    """Repeat the rows of remembered images, or of new ones, where one is a multiple of the other."""
    old, new = memory.num_rows, images.shape[0]
    if max(old, new) % min(old, new):
        raise ValueError(f"{name} has {new} rows, but the cache has seen the images of {old} prompts.")
    if new > old:
        rows = torch.arange(old, device=memory.hidden_states_BILE.device)
        memory = memory.rows(rows.repeat_interleave(new // old))
    return memory, images if old <= new else images.repeat_interleave(old // new, dim=0)


def _sees_more(seen_BI, encoded_BI, length: int) -> bool:
    """Whether text sees images that were not encoded. On an accelerator one-token steps do not ask: the question would
    stop them, and what is generated sees no more than the prompt did."""
    if length == 1 and seen_BI.device.type != "cpu":
        return False
    return bool((seen_BI & ~encoded_BI).any())


def _origin(memory, name, images, seen_BI, whole_mask_BTI, past_length, length):
    """The fields of an `ImageMemory` that say where its images came from, after new ones were added."""
    sources = (*(() if memory is None else memory.sources), (name, images))
    if torch.compiler.is_compiling() or seen_BI.is_meta:
        return {"sources": sources}
    encoded_BI = seen_BI
    if memory is not None:
        old_BI = memory.encoded_BI
        if old_BI is None:
            old_BI = seen_BI.new_ones((len(seen_BI), memory.num_images))
        encoded_BI = torch.cat((old_BI, seen_BI), dim=1)
    start = int(past_length)
    offset = 0 if whole_mask_BTI.shape[1] > length else start
    seeing = whole_mask_BTI.any(dim=2).any(dim=0).nonzero()
    first_seen = offset + int(seeing[0]) if len(seeing) else start + length
    if memory is not None:
        first_seen = min(first_seen, memory.first_seen)
    return {
        "sources": sources,
        "encoded_BI": None if encoded_BI.all() else encoded_BI,
        "first_seen": first_seen,
        "text_length": start + length,
    }
