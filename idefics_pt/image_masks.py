"""Operations on image masks: boolean, True = may see, (rows of text, positions, images).

Mirrors `idefics_tf/image_masks.py`; the rule of which token sees which image is `idefics_common.prompts.image_masks`.
Axes: see `idefics_common`.
"""

import torch
from torch.nn import functional as F

from idefics_common.prompts.image_masks import last_images


def mask_from_tokens(ids_BT, image_token_id: int, eos_token_id, num_images: int):
    """The image mask that the processor would have made for these ids.

    Args:
        ids_BT: token ids. eos_token_id: one id, several, or None.

    Returns:
        boolean mask (B, T, I).
    """
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=ids_BT.dtype, device=ids_BT.device)
    image_I = torch.arange(num_images, device=ids_BT.device)
    return last_images(ids_BT == image_token_id, torch.isin(ids_BT, ends), image_I, lambda x: x.cumsum(dim=1))


def widened_in_front(mask_BTI, length: int):
    """An image mask for so many positions: those in front of the ones that it covers see nothing."""
    return F.pad(mask_BTI, (0, 0, length - mask_BTI.shape[1], 0))


def widened_behind(mask_BTI, length: int, attention_mask, moved_B):
    """An image mask for so many positions: appended ones see what the last position before them saw.

    Args:
        attention_mask: (B, length or more), which leaves out the padding between text and appended text; or None.
        moved_B: by how many positions the text was moved to the left after the mask was made.
    """
    rows, covered, num_images = mask_BTI.shape
    last_B = torch.full((rows,), covered - 1, device=mask_BTI.device)
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] >= length:
        is_text_BT = (attention_mask[:, -length:] != 0)[:, :covered].to(mask_BTI.device)
        last_B = (is_text_BT * torch.arange(covered, device=mask_BTI.device)).amax(dim=1)
    place_BT = torch.arange(length, device=mask_BTI.device) + moved_B.unsqueeze(1)
    place_BT = torch.minimum(place_BT, (last_B + moved_B).clamp(max=covered - 1).unsqueeze(1))
    return mask_BTI.gather(1, place_BT.unsqueeze(2).expand(-1, -1, num_images))


def moved_to_left(mask_BTI, is_image_BT):
    """By how many positions each row of text was moved after its mask was made, as tools do that take out padding.

    Returns:
        (B,): where the mask first shows an image, less where the first image token is; 0 for rows without either.
    """
    is_seen_BT = mask_BTI.any(dim=2)
    both_B = is_seen_BT.any(dim=1) & is_image_BT.any(dim=1)
    return torch.where(both_B, is_seen_BT.int().argmax(dim=1) - is_image_BT.int().argmax(dim=1), 0)


def begins_at_tokens(mask_BTI, is_image_BT, offset_B):
    """Whether each image is first seen at an image token, `offset_B` behind its place in the mask; (B,)."""
    begins_BT = (mask_BTI & (mask_BTI.cumsum(dim=1) == 1)).any(dim=2)
    place_BT = torch.arange(begins_BT.shape[1], device=mask_BTI.device) + offset_B.unsqueeze(1)
    is_token_BT = is_image_BT.gather(1, place_BT.clamp(0, is_image_BT.shape[1] - 1)) & (place_BT >= 0)
    return (~begins_BT | is_token_BT).all(dim=1)


def seen_images(mask_BTI, image_rows: int):
    """Which images any position of their row may see, boolean (image rows, I)."""
    return mask_BTI.unflatten(0, (image_rows, -1)).any(dim=2).any(dim=1)


def sole_images(mask_BTI, image_rows: int):
    """The only image that is looked at of each row of images, where that is at most one: the rest need not be read.

    Asked on the CPU only, where the answer is at hand: an accelerator would have to stop for it.

    Returns:
        a list of image numbers, one per row of images, or None if some row looks at several or nobody may ask.
    """
    is_captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if mask_BTI.device.type != "cpu" or is_captured or mask_BTI.shape[2] < 2:
        return None
    seen_BI = seen_images(mask_BTI, image_rows)
    if int(seen_BI.sum(dim=1).max()) > 1:
        return None
    return seen_BI.int().argmax(dim=1).tolist()


def attendable(mask_BTI, tokens_per_image: int):
    """Widen an image mask to image memory, and split off the gate.

    Returns:
        mask (B, T, M) whose rows all have a True, since a softmax over nothing is undefined: rows that may see no image
        see all of them, and the gate takes the result away; and the gate (B, T), False for those rows.
    """
    gate_BT = mask_BTI.any(dim=-1)
    open_BTI = mask_BTI | ~gate_BT.unsqueeze(-1)
    return open_BTI.repeat_interleave(tokens_per_image, dim=-1), gate_BT
