"""Which image a text token may attend to, derived from the token ids alone.

IDEFICS was trained so that a token sees one image at most: the last one whose placeholder stands at or before it,
unless an end of text lies between the two. The end itself still sees the image. `last_images` is that rule, for arrays
of numpy, torch and TensorFlow alike. Free of transformers and of any tensor framework.
"""

import functools
from collections.abc import Sequence

import numpy as np


def last_images(is_image_BT, is_end_BT, image_I, cumulated):
    """The image mask, boolean (B, T, I), of arrays of any framework.

    Args:
        is_image_BT, is_end_BT: boolean, the placeholders of images and the ends of text.
        image_I: the numbers 0 to I - 1. cumulated: cumulative sum of a boolean array over the axis T.
    """
    is_last_BTI = cumulated(is_image_BT)[..., None] == image_I + 1
    is_its_end_BTI = is_last_BTI & is_end_BT[..., None]
    ends_BTI = cumulated(is_its_end_BTI)
    return is_last_BTI & ((ends_BTI == 0) | (is_its_end_BTI & (ends_BTI == 1)))


def image_attention_mask(
    input_ids: np.ndarray, image_token_id: int | None, eos_token_id: int | Sequence[int] | None, num_images: int
) -> np.ndarray:
    """Build the mask that goes with processed prompts.

    Padding has no rule of its own: pads before the first image see nothing, pads after it see what the text there
    sees. The attention mask of the text takes them out.

    Args:
        input_ids: integers of shape (B, T).
        image_token_id: id of the placeholder of an image, or None where the tokenizer has none.
        eos_token_id: id of the end of text, several, or None where the tokenizer has none.
        num_images: I, at least 1. Tokens after a placeholder beyond the I-th see nothing.

    Returns:
        int64 of shape (B, T, I): 1 where the token may attend to the image.

    Raises:
        ValueError: if `input_ids` is not two-dimensional, or `num_images` is below 1.
    """
    ids_BT = np.asarray(input_ids)
    if ids_BT.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, text length), got {ids_BT.shape}.")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    is_end_BT = np.isin(ids_BT, [] if eos_token_id is None else eos_token_id)
    cumulated = functools.partial(np.cumsum, axis=1)
    return last_images(ids_BT == image_token_id, is_end_BT, np.arange(num_images), cumulated).astype(np.int64)
