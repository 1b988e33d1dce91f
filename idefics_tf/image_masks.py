"""Operations on image masks: boolean, True = may see, (rows of text, positions, images).

Mirrors `idefics_pt/image_masks.py`; the rule of which token sees which image is `idefics_common.prompts.image_masks`.
Axes: see `idefics_common`.
"""

import tensorflow as tf
from keras import ops

from idefics_common.prompts.image_masks import last_images
from idefics_tf.layers import reshape, sizes


def mask_from_tokens(ids_BT, image_token_id: int, eos_token_id, num_images):
    """The image mask that the processor would have made for these ids.

    Args:
        ids_BT: token ids. eos_token_id: one id, several, or None.

    Returns:
        boolean mask (B, T, I).
    """
    ids_BT = tf.convert_to_tensor(ids_BT)
    end_ids = ops.reshape(ops.cast([] if eos_token_id is None else eos_token_id, ids_BT.dtype), (-1,))
    is_end_BT = ops.any(ops.expand_dims(ids_BT, -1) == end_ids, axis=-1)

    def cumulated(x):
        return ops.cumsum(ops.cast(x, "int32"), axis=1)

    return last_images(ids_BT == image_token_id, is_end_BT, ops.arange(num_images), cumulated)


def widened_in_front(mask_BTI, length: int):
    """An image mask for so many positions: those in front of the ones that it covers see nothing."""
    return tf.pad(mask_BTI, ((0, 0), (length - mask_BTI.shape[1], 0), (0, 0)))


def widened_behind(mask_BTI, length: int, attention_mask, moved_B):
    """An image mask for so many positions: appended ones see what the last position before them saw.

    Args:
        attention_mask: (B, length or more), which leaves out the padding between text and appended text; or None.
        moved_B: by how many positions the text was moved to the left after the mask was made.
    """
    covered = mask_BTI.shape[1]
    last_B = tf.fill(tf.shape(moved_B), covered - 1)
    if attention_mask is not None:
        is_text_BT = ops.cast(attention_mask, "bool")[:, -length:][:, :covered]
        last_B = ops.max(tf.where(is_text_BT, tf.range(covered), 0), axis=1)
    place_BT = tf.range(length) + ops.expand_dims(moved_B, 1)
    place_BT = tf.minimum(place_BT, ops.expand_dims(tf.minimum(last_B + moved_B, covered - 1), 1))
    return tf.gather(mask_BTI, place_BT, axis=1, batch_dims=1)


def moved_to_left(mask_BTI, is_image_BT):
    """By how many positions each row of text was moved after its mask was made, as tools do that take out padding.

    Returns:
        (B,): where the mask first shows an image, less where the first image token is; 0 for rows without either.
    """
    is_seen_BT = ops.any(mask_BTI, axis=2)
    both_B = ops.logical_and(ops.any(is_seen_BT, axis=1), ops.any(is_image_BT, axis=1))
    return tf.where(both_B, _first(is_seen_BT) - _first(is_image_BT), 0)


def begins_at_tokens(mask_BTI, is_image_BT, offset_B):
    """Whether each image is first seen at an image token, `offset_B` behind its place in the mask; (B,)."""
    first_BTI = ops.cumsum(ops.cast(mask_BTI, "int32"), axis=1) == 1
    begins_BT = ops.any(ops.logical_and(mask_BTI, first_BTI), axis=2)
    place_BT = tf.range(begins_BT.shape[1]) + ops.expand_dims(offset_B, 1)
    is_token_BT = tf.gather(is_image_BT, tf.clip_by_value(place_BT, 0, is_image_BT.shape[1] - 1), axis=1, batch_dims=1)
    is_token_BT = ops.logical_and(is_token_BT, place_BT >= 0)
    return ops.all(ops.logical_or(ops.logical_not(begins_BT), is_token_BT), axis=1)


def _first(is_BT):
    return tf.argmax(ops.cast(is_BT, "int32"), axis=1, output_type="int32")


def seen_images(mask_BTI, image_rows):
    """Which images any position of their row may see, boolean (image rows, I)."""
    _, length, num_images = sizes(mask_BTI)
    return ops.any(ops.reshape(mask_BTI, (image_rows, -1, length, num_images)), axis=(1, 2))


def attendable(mask_BTI, tokens_per_image: int):
    """Widen an image mask to image memory, and split off the gate.

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
