"""What a cache remembers of images: their keys and values in every gated block, made once.

Unusual: transformers' caches hold text only, and `generate` builds its own, so the image memory is a plain value that
travels *on* whatever cache is in use (dynamic, static, offloaded, the user's own) as its attribute `image_memory`. It
has one row per prompt, not per beam: reordering beams, cropping and repeating the text cache leave it as it is, and a
copied cache takes it along. Who picks or permutes *prompts* in a cache does the same to its images by `select_images`.

Mirrors `idefics_tf/cache.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, replace

import torch

_ATTRIBUTE = "image_memory"


@dataclass(frozen=True)
class ImageMemory:
    """Images that earlier calls have seen.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        last_mask_BI: which images the last position may see, boolean; the rows of the text, beams included.
        encoded_BI: which images were encoded, boolean; the others could not be seen by anyone and are zeros. None if
            all were.
        sources: the images as they were given, (name of the argument, tensor) call by call.
        first_seen: the first position of the text that may see an image.
        text_length: how much text the cache held after the call that brought the last image.
        mask_start: the first position from which on all text may see what `last_mask_BI` says; None if nobody asked.
    """

    hidden_states_BILE: torch.Tensor
    key_values: list[tuple[torch.Tensor, torch.Tensor]]
    last_mask_BI: torch.Tensor
    encoded_BI: torch.Tensor | None = None
    sources: tuple[tuple[str, torch.Tensor], ...] = ()
    first_seen: int = 0
    text_length: int = 1
    mask_start: int | None = None

    @property
    def num_images(self) -> int:
        """Images per row, padding included."""
        return self.hidden_states_BILE.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows of images; the rows of text are a multiple of them."""
        return self.hidden_states_BILE.shape[0]

    def holds(self, name: str, images: torch.Tensor) -> bool:
        """Whether these are exactly the images that were given before."""
        if any(source_name != name for source_name, _ in self.sources) or not self.sources:
            return False
        known = [source for _, source in self.sources]
        if len(known) == 1 and known[0] is images:
            return True
        if any(source.shape[:1] + source.shape[2:] != images.shape[:1] + images.shape[2:] for source in known):
            return False
        known = torch.cat([source.to(images.device, images.dtype) for source in known], dim=1)
        return torch.equal(known, images)

    def narrowed(self, images: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (B, H, L, K) of one image per row, its number in `images`; views where all numbers agree."""
        length = self.hidden_states_BILE.shape[2]
        if len(set(images)) == 1:
            place = slice(images[0] * length, (images[0] + 1) * length)
            return [tuple(x[:, :, place] for x in key_value) for key_value in self.key_values]
        rows, numbers = torch.arange(len(images)), torch.tensor(images)
        return [
            tuple(x.unflatten(2, (-1, length))[rows, :, numbers] for x in key_value) for key_value in self.key_values
        ]

    def mark_static(self) -> None:
        """Tell compiled steps that features, keys and values stay where they are, as static caches do with theirs: a
        CUDA graph reads them there, and would otherwise copy them all into memory of its own at every token."""
        for tensor in (self.hidden_states_BILE, *(x for key_value in self.key_values for x in key_value)):
            torch._dynamo.mark_static_address(tensor)

    def rows(self, indices: torch.Tensor) -> "ImageMemory":
        """The memory of other prompts: row i of the result is row ``indices[i]``; indices (rows,) may repeat."""
        copies = len(self.last_mask_BI) // self.num_rows

        def pick(x):
            return x[indices.to(x.device)]  # each block's keys and values are where the block is

        return replace(
            self,
            hidden_states_BILE=pick(self.hidden_states_BILE),
            key_values=[tuple(map(pick, key_value)) for key_value in self.key_values],
            last_mask_BI=pick(self.last_mask_BI.unflatten(0, (self.num_rows, copies))).flatten(0, 1),
            encoded_BI=None if self.encoded_BI is None else pick(self.encoded_BI),
            sources=tuple((name, pick(source)) for name, source in self.sources),
        )


def recall_images(cache) -> ImageMemory | None:
    """The image memory that travels on `cache`, or None."""
    return getattr(cache, _ATTRIBUTE, None)


def remember_images(cache, memory: ImageMemory | None) -> None:
    """Put an image memory on `cache`, in place of any earlier one; None takes it off."""
    setattr(cache, _ATTRIBUTE, memory)


def select_images(cache, indices: torch.Tensor) -> None:
    """Keep the images of some prompts only, or in another order, as `Cache.batch_select_indices` does with their text.

    Args:
        cache: a cache, changed in place; without images nothing happens.
        indices: (prompts,) numbers of the prompts to keep; prompts, not beams.
    """
    memory = recall_images(cache)
    if memory is not None:
        remember_images(cache, memory.rows(indices.to(memory.hidden_states_BILE.device)))
