"""From what a caller says about images to what the decoder needs: boolean masks, and only the real images encoded.

Unusual: the mask decides which images are worth encoding. An image that no position of its row may see (padding, or the
zero image of a text-only row) does not go through the vision tower; its states are zero. In a graph, too: there the
number of encoded images is only known when it runs.

Mirrors `idefics_pt/image_inputs.py`. Axes: see `idefics_common`.
"""

import tensorflow as tf
from keras import ops

from idefics_tf.layers import reshape, sizes


def mask_from_tokens(ids_BT, image_token_id: int, eos_token_id, num_images):
    """The image mask that the processor would have made for these ids.

    A position sees the last image at or before it; none before the first image, and none after an end of text until the
    next image.

    Args:
        ids_BT: token ids. eos_token_id: one id, several, or None.

    Returns:
        boolean mask (B, T, I).
    """
    is_image_BT = ids_BT == image_token_id
    current_BT = ops.cumsum(ops.cast(is_image_BT, "int32"), axis=1) - 1
    if eos_token_id is not None:
        eos_ids = ops.reshape(ops.cast(eos_token_id, ids_BT.dtype), (-1,))
        is_eos_BT = ops.any(ops.expand_dims(ids_BT, -1) == eos_ids, axis=-1)
        position_T = ops.arange(ops.shape(ids_BT)[1])
        # the end of text itself still sees the image; what follows does not, until an image comes
        is_later_TS = position_T[:, None] > position_T[None, :]
        same_image_BTS = current_BT[:, :, None] == current_BT[:, None, :]
        ended_BT = ops.any(is_eos_BT[:, None, :] & is_later_TS & same_image_BTS, axis=-1)
        current_BT = ops.where(ended_BT, -1, current_BT)
    return ops.expand_dims(current_BT, -1) == ops.arange(num_images)


def seen_images(mask_BTI, image_rows):
    """Which images any position of their row may see, boolean (image rows, I)."""
    _, length, num_images = sizes(mask_BTI)
    return ops.any(ops.reshape(mask_BTI, (image_rows, -1, length, num_images)), axis=(1, 2))


def encode_seen(encode, images, seen_BI, keep_one: bool):
    """Run `encode` on the images that are seen, and put its results in their places among zeros.

    Args:
        encode: from (images, ...) to (images, L, E).
        images: (B, I, ...).
        seen_BI: boolean, or None to encode all.
        keep_one: return states also if nothing is seen, for training, where every variable should have a gradient.

    Returns:
        (B, I, L, E), zero where not seen, or, in eager execution, None if nothing is seen at all.
    """
    rows, num_images = sizes(images)[:2]
    flat = ops.reshape(images, (-1, *images.shape[2:]))
    if seen_BI is None:
        return _unflatten(encode(flat), rows, num_images)
    chosen = tf.where(ops.reshape(seen_BI, (-1,)))
    if tf.executing_eagerly():
        if len(chosen) == 0 and not keep_one:
            return None
        if len(chosen) == len(flat):
            return _unflatten(encode(flat), rows, num_images)
    encoded = encode(tf.gather_nd(flat, chosen))
    shape = tf.stack((sizes(flat)[0], *sizes(encoded)[1:]))
    states = tf.scatter_nd(chosen, encoded, tf.cast(shape, chosen.dtype))
    return _unflatten(ops.reshape(states, (-1, *encoded.shape[1:])), rows, num_images)


def _unflatten(states, rows, num_images):
    return ops.reshape(states, (rows, num_images, *states.shape[1:]))


def attendable(mask_BTI, tokens_per_image: int):
    """Widen an image mask to image memory, and split off the gate.

    Args:
        mask_BTI: boolean, True = may attend.

    Returns:
        mask (B, T, M) whose rows all have a True, since a softmax over nothing is undefined: rows that may see no image
        see all of them, and the gate takes the result away; and the gate (B, T), False for those rows.
    """
    gate_BT = ops.any(mask_BTI, axis=-1)
    open_BTI = ops.logical_or(mask_BTI, ops.expand_dims(ops.logical_not(gate_BT), -1))
    rows, length, num_images = sizes(open_BTI)
    # `ops.repeat` takes a dozen operations
    open_BTIL = tf.tile(ops.expand_dims(open_BTI, -1), (1, 1, 1, tokens_per_image))
    return reshape(open_BTIL, (rows, length, num_images * tokens_per_image)), gate_BT


def given_images(**candidates):
    """The one form in which images were given, as (name, tensor), or None. Several are a ValueError."""
    given = [(name, value) for name, value in candidates.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give images in one form only, got {' and '.join(name for name, _ in given)}.")
    return given[0] if given else None


def settle_mask(mask_BTI, num_old, num_new, rows, default, are_repeated):
    """Bring the image mask of a call into one form, and say whether its images are new.

    Args:
        mask_BTI: what the caller gave, any dtype, or None.
        num_old: images per row that the cache has seen. num_new: images per row given with this call. Both, and the
            sizes below, are tensors where a graph does not know them; then they are trusted.
        rows: rows of text. default: makes the boolean mask if none was given.
        are_repeated: says whether the images given with this call are those that the cache has seen, once more.

    Returns:
        boolean mask over old and new images, or None if there are no images; and whether the given images are new.
        Callers of transformers' model have to give images again with every call; then there is nothing to do.

    Raises:
        ValueError: if the mask does not cover the images there are, or would let other images pass for known ones.
    """
    if is_zero(num_old) and is_zero(num_new):
        if mask_BTI is not None and tf.executing_eagerly() and bool(ops.any(ops.cast(mask_BTI, "bool"))):
            raise ValueError(
                "image_attention_mask lets text attend to images, but there are none: give pixel_values, "
                "image_encoder_embeddings or perceiver_embeddings, or a cache that has seen images."
            )
        return None, False
    mask_BTI = default() if mask_BTI is None else ops.cast(mask_BTI, "bool")
    if len(mask_BTI.shape) != 3 or not _may_equal(mask_BTI.shape[0], rows):
        raise ValueError(
            f"image_attention_mask must have shape (batch, text_len, num_images) with batch {rows}, "
            f"got {tuple(mask_BTI.shape)}."
        )
    covered = mask_BTI.shape[2]
    if not are_known(covered, num_old, num_new):
        return mask_BTI, not is_zero(num_new)
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


def are_known(*sizes) -> bool:
    """Whether all of some sizes are numbers, and none a tensor that a graph will only know when it runs."""
    return all(isinstance(size, int) for size in sizes)


def is_zero(size) -> bool:
    """Whether a size is known to be zero."""
    return isinstance(size, int) and size == 0


def _may_equal(size, other) -> bool:
    return not are_known(size, other) or size == other


def mask_of_call(mask_BTI, past_length, length):
    """The rows of an image mask that belong to this call's positions.

    Args:
        mask_BTI: over this call's positions, or over all positions from the start of the text.

    Raises:
        ValueError: if it is over neither.
    """
    covered = sizes(mask_BTI)[1]
    if are_known(covered, length) and covered == length:
        return mask_BTI
    if is_zero(past_length) and _may_equal(covered, length):
        return mask_BTI
    if not are_known(covered, past_length, length):
        start = tf.where(tf.equal(covered, length), 0, past_length)
        return mask_BTI[:, start : start + length]
    if covered < past_length + length:
        raise ValueError(
            f"image_attention_mask has text_len {covered}; expected {length}, the positions of this call, or "
            f"at least {past_length + length}, all positions so far."
        )
    return mask_BTI[:, past_length : past_length + length]
