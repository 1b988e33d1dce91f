"""The cached decode step with plain tensors in and out, for `torch.export` and for servers that keep caches themselves.

Unusual: a `Cache` is a Python object with the image memory on it, and a graph's inputs have to be tensors. `DecodeStep`
takes the cache apart and puts it together again; the arithmetic is the model's own. Encoding is exported as
``model.model.vision_model`` (and resampler). Prefill is the model itself, exported with ``use_cache=False`` where only
logits are wanted; the keys and values that the first step needs come from a cache that an unexported prefill filled
(`unpack_cache`).

Axes: see `idefics_common`.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from idefics_pt.cache import ImageMemory, recall_images, remember_images

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


class DecodeStep(nn.Module):
    """One call of an `IdeficsForVisionText2Text` on top of what earlier calls left, as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids,
        attention_mask,
        image_attention_mask,
        key_values: KeyValues,
        image_key_values: KeyValues,
        image_hidden_states,
    ):
        """Compute logits and extended keys and values.

        Args:
            input_ids: (B, T), usually with T = 1.
            attention_mask: (B, S + T). image_attention_mask: (B, T, I).
            key_values: keys and values (B, H, S, K) of each decoder layer.
            image_key_values: keys and values (B, H, M, K) of each gated block.
            image_hidden_states: (B, I, L, E), as the model returns them.

        Returns:
            logits (B, T, V), and keys and values (B, H, S + T, K) of each decoder layer.
        """
        cache = DynamicCache(config=self.model.config)
        for i, (key, value) in enumerate(key_values):
            cache.update(key, value, i)
        # all images are there, and what the text before saw is not asked, since the mask says what this call sees
        encoded_BI = image_hidden_states.new_ones(image_hidden_states.shape[:2], dtype=torch.bool)
        seen_BSI = (image_attention_mask[:, -1:] != 0).expand(-1, cache.get_seq_length(), -1)
        remember_images(cache, ImageMemory(image_hidden_states, tuple(image_key_values), seen_BSI, encoded_BI))
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_attention_mask=image_attention_mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def unpack_cache(cache) -> tuple[KeyValues, KeyValues, torch.Tensor]:
    """`key_values`, `image_key_values` and `image_hidden_states` of `DecodeStep` from a cache that a prefill filled.

    Raises:
        ValueError: if the cache has seen no image.
    """
    memory = recall_images(cache)
    if memory is None:
        raise ValueError("The cache has seen no image; DecodeStep is for prompts with images.")
    return [(layer.keys, layer.values) for layer in cache.layers], list(memory.key_values), memory.hidden_states_BILE
