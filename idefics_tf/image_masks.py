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
