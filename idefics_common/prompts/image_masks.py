"""Which image a text token may attend to, derived from the token ids alone.

IDEFICS was trained so that a token sees one image at most: the last one whose placeholder stands at or before it.
Nothing is seen before the first image, nor after an end of text (the end itself still sees it) until the next image.
Free of transformers and of any tensor framework.
"""

from collections.abc import Sequence

import numpy as np


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
    is_image_BT = ids_BT == image_token_id
    is_end_BT = np.isin(ids_BT, [] if eos_token_id is None else eos_token_id)
    # the last image at or before each token, and the ends of text strictly before it
    is_last_BTI = np.cumsum(is_image_BT, axis=1)[:, :, None] == np.arange(1, num_images + 1)
    ends_BT1 = (np.cumsum(is_end_BT, axis=1) - is_end_BT)[:, :, None]
    ends_before_image_B1I = np.max(ends_BT1 * (is_last_BTI & is_image_BT[:, :, None]), axis=1, keepdims=True, initial=0)
    return (is_last_BTI & (ends_BT1 == ends_before_image_B1I)).astype(np.int64)
