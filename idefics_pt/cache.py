"""What a cache remembers of images: their keys and values in every gated block, made once.

Unusual: transformers' caches hold text only, and `generate` builds its own, so the image memory is a plain value that
travels *on* whatever cache is in use (dynamic, static, offloaded, the user's own) as its attribute `image_memory`. It
has one row per prompt, not per beam: reordering, cropping and repeating the text cache leave it as it is, and a copied
cache takes it along.

Mirrors `idefics_tf/cache.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass

import torch

_ATTRIBUTE = "image_memory"


@dataclass
class ImageMemory:
    """Images that earlier calls have seen.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        last_mask_BI: which images the last position may see, boolean; the rows of the text, beams included.
    """

    hidden_states_BILE: torch.Tensor
    key_values: list[tuple[torch.Tensor, torch.Tensor]]
    last_mask_BI: torch.Tensor

    @property
    def num_images(self) -> int:
        """Images per row, padding included."""
        return self.hidden_states_BILE.shape[1]


def recall_images(cache) -> ImageMemory | None:
    """The image memory that travels on `cache`, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def remember_images(cache, memory: ImageMemory | None) -> None:
    """Put an image memory on `cache`, in place of any earlier one; None takes it off."""
    setattr(cache, _ATTRIBUTE, memory)
