"""From what a caller says about images to what the decoder needs: boolean masks, and only the real images encoded.

Unusual: the mask decides which images are worth encoding. An image that no position of its row may see (padding, or the
zero image of a text-only row) does not go through the vision tower; its states are zero.

Mirrors `idefics_tf/image_inputs.py`. Axes: see `idefics_common`.
"""

import torch


def mask_from_tokens(ids_BT, image_token_id: int, eos_token_id, num_images: int):
    """The image mask that the processor would have made for these ids.

    A position sees the last image at or before it; none before the first image, and none after an end of text until the
    next image.

    Args:
        ids_BT: token ids. eos_token_id: one id, several, or None.

    Returns:
        boolean mask (B, T, I).
    """
    is_image = ids_BT == image_token_id
    current_BT = is_image.cumsum(dim=1) - 1
    if eos_token_id is not None:
        eos = torch.as_tensor(eos_token_id, device=ids_BT.device).flatten()
        position = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last_image = torch.where(is_image, position, -1).cummax(dim=1).values
        last_eos = torch.where(torch.isin(ids_BT, eos), position, -1).cummax(dim=1).values
        # the end of text itself still sees the image; what follows does not
        ended = torch.cat((torch.zeros_like(is_image[:, :1]), last_eos[:, :-1] > last_image[:, :-1]), dim=1) & ~is_image
        current_BT = torch.where(ended, -1, current_BT)
    return current_BT.unsqueeze(-1) == torch.arange(num_images, device=ids_BT.device)


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


def encode_seen(encode, images, seen_BI, keep_one: bool):
    """Run `encode` on the images that are seen, and put its results in their places among zeros.

    Args:
        encode: from (images, ...) to (images, L, E).
        images: (B, I, ...).
        seen_BI: boolean, or None to encode all. Also all are encoded while a graph is being captured, where shapes may
            not depend on values.
        keep_one: encode at least one image, for training on several devices, where every rank has to run the same
            modules or the others wait for it forever.

    Returns:
        (B, I, L, E), zero where not seen, or None if nothing is seen at all.
    """
    rows, num_images = images.shape[:2]
    flat = images.flatten(0, 1)
    if seen_BI is None or torch.compiler.is_compiling() or flat.is_meta:
        states = encode(flat).unflatten(0, (rows, num_images))
        return states if seen_BI is None else states.masked_fill(~seen_BI[..., None, None].to(states.device), 0.0)
    chosen = seen_BI.flatten().nonzero().squeeze(-1).to(flat.device)
    if len(chosen) == 0 and keep_one:
        chosen = torch.zeros(1, dtype=torch.long, device=flat.device)
    if len(chosen) == 0:
        return None
    if len(chosen) == len(flat):
        return encode(flat).unflatten(0, (rows, num_images))
    encoded = encode(flat[chosen])
    states = encoded.new_zeros((len(flat), *encoded.shape[1:]))
    return states.index_copy(0, chosen.to(states.device), encoded).unflatten(0, (rows, num_images))


def attendable(mask_BTI, tokens_per_image: int):
    """Widen an image mask to image memory, and split off the gate.

    Args:
        mask_BTI: boolean, True = may attend.

    Returns:
        mask (B, T, M) whose rows all have a True, since a softmax over nothing is undefined: rows that may see no image
        see all of them, and the gate takes the result away; and the gate (B, T), False for those rows.
    """
    gate_BT = mask_BTI.any(dim=-1)
    open_BTI = mask_BTI | ~gate_BT.unsqueeze(-1)
    return open_BTI.repeat_interleave(tokens_per_image, dim=-1), gate_BT


def given_images(**candidates):
    """The one form in which images were given, as (name, tensor), or None. Several are a ValueError."""
    given = [(name, value) for name, value in candidates.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give images in one form only, got {' and '.join(name for name, _ in given)}.")
    return given[0] if given else None


def settle_mask(mask_BTI, num_old: int, num_new: int, rows: int, default, are_repeated):
    """Bring the image mask of a call into one form, and say whether its images are new.

    Args:
        mask_BTI: what the caller gave, any dtype, or None.
        num_old: images per row that the cache has seen. num_new: images per row given with this call.
        rows: rows of text. default: makes the boolean mask if none was given.
        are_repeated: says whether the images given with this call are those that the cache has seen, once more.

    Returns:
        boolean mask over old and new images, or None if there are no images; and whether the given images are new.
        Callers of transformers' model have to give images again with every call; then there is nothing to do.

    Raises:
        ValueError: if the mask does not cover the images there are, or would let other images pass for known ones.
    """
    if num_old + num_new == 0:
        if mask_BTI is not None and not torch.compiler.is_compiling() and not mask_BTI.is_meta and mask_BTI.any():
            raise ValueError(
                "image_attention_mask lets text attend to images, but there are none: give pixel_values, "
                "image_encoder_embeddings or perceiver_embeddings, or a cache that has seen images."
            )
        return None, False
    mask_BTI = default() if mask_BTI is None else mask_BTI != 0
    if mask_BTI.dim() != 3 or mask_BTI.shape[0] != rows:
        raise ValueError(
            f"image_attention_mask must have shape (batch, text_len, num_images) with batch {rows}, "
            f"got {tuple(mask_BTI.shape)}."
        )
    covered = mask_BTI.shape[2]
    if covered == num_old + num_new:
        return mask_BTI, num_new > 0
    counts = f"{num_old} that the cache has seen and {num_new} given with this call"
    if num_old > 0 and covered == num_old == num_new:
        if are_repeated():
            return mask_BTI, False
        raise ValueError(
            f"image_attention_mask covers {covered} images per row, but there are {counts}, and these are others. For "
            "new images it must cover all of them, earlier ones first; for another text take a new cache."
        )
    raise ValueError(
        f"image_attention_mask covers {covered} images per row, but there are {num_old + num_new}: {counts}. It must "
        "cover all of them, earlier ones first."
    )


def mask_of_call(mask_BTI, past_length, length: int):
    """The rows of an image mask that belong to this call's positions.

    Args:
        mask_BTI: over this call's positions, or over all positions from the start of the text.

    Raises:
        ValueError: if it is over neither.
    """
    if mask_BTI.shape[1] == length:
        return mask_BTI
    start = int(past_length)
    if mask_BTI.shape[1] < start + length:
        raise ValueError(
            f"image_attention_mask has text_len {mask_BTI.shape[1]}; expected {length}, the positions of this call, or "
            f"at least {start + length}, all positions so far."
        )
    return mask_BTI[:, start : start + length]
