"""Operations on image masks: boolean, True = may see, (rows of text, positions, images).

Mirrors `idefics_tf/image_masks.py`; the rule of which token sees which image is `idefics_common.prompts.image_masks`.
Axes: see `idefics_common`.
"""

import torch

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
