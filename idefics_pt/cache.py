"""What a cache remembers of images: keys and values in every gated block, made once, and which position sees which.

Unusual: transformers' caches hold text only, and `generate` builds its own, so the image memory is a plain value that
travels *on* whatever cache is in use (dynamic, static, offloaded, the user's own) as its attribute `image_memory`. Its
images have one row per prompt, not per beam. It is asked with the length of the text that the cache holds, so a text
that is cropped, emptied, repeated, or reordered among beams that see the same images leaves it as it is. Who picks or
permutes *prompts* in a cache of transformers does the same to its images by `select_images`; our own cache
(`GrowingCache`) does so itself.

Mirrors `idefics_tf/cache.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from idefics_pt.torch_internals import mark_static_address


@dataclass(eq=False)
class ImageMemory:
    """Images that earlier calls have seen: a tree of tensors, and nothing else, not even a number.

    Not frozen, because exporters of transformers put tensors of their own in the places of these.

    Attributes:
        hidden_states_BILE: what text attends to, after the resampler if there is one (then L latents, else P tokens).
        key_values: keys and values (B, H, M, K) of each gated block.
        seen_BSI: which images each position of the text may see, boolean. Its rows are those of the text, or fewer,
            each for as many adjacent ones. Positions behind those that the cache holds do not count. On static caches
            it has room for all positions, and is written in place.
        encoded_BI: which images were encoded, boolean; the others could not be seen by anyone and are zeros.
    """

    hidden_states_BILE: torch.Tensor
    key_values: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    seen_BSI: torch.Tensor
    encoded_BI: torch.Tensor

    @property
    def num_images(self) -> int:
        """Images per row, padding included."""
        return self.hidden_states_BILE.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows of images; the rows of text are a multiple of them."""
        return self.hidden_states_BILE.shape[0]

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
        """Tell compiled steps that these tensors stay where they are, as static caches do with theirs.

        A CUDA graph reads them there, and would otherwise copy them all into memory of its own at every token.
        """
        if mark_static_address is None:
            return
        for tensor in (self.hidden_states_BILE, self.seen_BSI, *(x for pair in self.key_values for x in pair)):
            mark_static_address(tensor)

    def rows(self, indices: torch.Tensor) -> "ImageMemory":
        """The memory of other prompts: row i of the result is row ``indices[i]``; indices (rows,) may repeat."""

        def pick(x):
            return x[indices.to(x.device)]  # each block's keys and values are where the block is

        return ImageMemory(
            pick(self.hidden_states_BILE),
            tuple(tuple(map(pick, key_value)) for key_value in self.key_values),
            pick(self.seen_BSI.unflatten(0, (self.num_rows, -1))).flatten(0, 1),
            pick(self.encoded_BI),
        )

    def text_rows(self, indices: torch.Tensor, rows: int) -> "ImageMemory":
        """The memory for some of the `rows` rows of text, ``indices``, each with images of its own."""
        seen_BSI = _for_rows(self.seen_BSI, rows)
        memory = self.rows(indices // (rows // self.num_rows))
        return replace(memory, seen_BSI=seen_BSI[indices.to(seen_BSI.device)])

    def __deepcopy__(self, memo):
        # images are never written to, so that copies of a prompt's cache share them
        return replace(self, seen_BSI=self.seen_BSI.clone())


def recall_images(cache) -> ImageMemory | None:
    """The image memory that travels on `cache`, or None."""
    return getattr(cache, "image_memory", None)


def remember_images(cache, memory: ImageMemory | None) -> None:
    """Put an image memory on `cache`, in place of any earlier one; None takes it off."""
    cache.image_memory = memory


def select_images(cache, indices: torch.Tensor) -> None:
    """Keep the images of some prompts only, or in another order, as `Cache.batch_select_indices` does with their text.

    Args:
        cache: a cache of transformers, changed in place; without images nothing happens.
        indices: (prompts,) numbers of the prompts to keep, a tensor or a list; prompts, not beams.
    """
    memory = recall_images(cache)
    if memory is not None:
        remember_images(cache, memory.rows(torch.as_tensor(indices)))


def seen_at_end(seen_BSI, past_length, rows: int):
    """Which images the last of `past_length` positions may see, for so many rows of text, boolean (rows, I).

    `past_length` is a scalar tensor on static caches; there 0 is possible, and sees nothing.
    """
    if isinstance(past_length, torch.Tensor):
        last_BI = seen_BSI.index_select(1, (past_length - 1).clamp(min=0).view(1)).squeeze(1) & (past_length > 0)
    else:
        last_BI = seen_BSI[:, past_length - 1]
    return _for_rows(last_BI, rows)


def seen_so_far(seen_BSI, mask_BTI, past_length, capacity: int | None):
    """`ImageMemory.seen_BSI` after a call: what was seen before, image by image, and then the mask of the call.

    Args:
        seen_BSI: before the call, over any number of images, or None. mask_BTI: over the positions of the call.
        past_length: positions that the cache held before. capacity: positions that a static cache has room for, in
            which `seen_BSI` is written in place where its size allows; None for other caches.
    """
    rows, length, num_images = mask_BTI.shape
    if seen_BSI is None:
        seen_BSI = mask_BTI.new_zeros((rows, past_length if capacity is None else capacity, num_images))
    seen_BSI = with_images(_for_rows(seen_BSI, rows), num_images)
    if capacity is None:
        return torch.cat((seen_BSI[:, :past_length], mask_BTI), dim=1)
    if not torch.compiler.is_compiling() and seen_BSI.is_inference() and not torch.is_inference_mode_enabled():
        seen_BSI = seen_BSI.clone()  # such a tensor is not to be written to outside of inference mode
    return seen_BSI.index_copy_(1, torch.arange(length, device=mask_BTI.device) + past_length, mask_BTI)


def with_images(mask, num_images: int):
    """A boolean mask (..., I) over another number of images: the last ones are left out, or new ones are not seen."""
    return mask if mask.shape[-1] == num_images else F.pad(mask, (0, num_images - mask.shape[-1]))


def _for_rows(seen, rows: int):
    known = seen.shape[0]
    if rows % known:
        raise ValueError(
            f"The cache has seen {known} rows of text; {rows} do not fit. Who picks rows of a cache of transformers "
            "picks their prompts' images by idefics_pt.cache.select_images; GrowingCache does so itself."
        )
    return seen if rows == known else seen.repeat_interleave(rows // known, dim=0)
