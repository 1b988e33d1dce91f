"""Which image a text token may attend to, derived from the token ids alone.

IDEFICS was trained so that a token sees one image at most: the last one whose placeholder stands at or before it.
Nothing is seen before the first image, nor after an end of text (the end itself still sees it) until the next image.
Free of transformers and of any tensor framework.
"""

import numpy as np


def image_attention_mask(
    input_ids: np.ndarray, image_token_id: int | None, eos_token_id: int | None, num_images: int
) -> np.ndarray:
    """Build the mask that goes with processed prompts.

    Padding has no rule of its own: pads before the first image see nothing, pads after it see what the text there
    sees. The attention mask of the text takes them out.

    Args:
        input_ids: integers of shape (B, T).
        image_token_id: id of the placeholder of an image, or None where the tokenizer has none.
        eos_token_id: id of the end of text, or None where the tokenizer has none.
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
    seen_BT = np.cumsum(is_image_BT, axis=1) - 1  # index of the last image, -1 before the first
    if eos_token_id is not None:
        ended_BT = _ended(is_image_BT, ids_BT == eos_token_id)
        seen_BT[ended_BT] = -1
    return (seen_BT[:, :, None] == np.arange(num_images)).astype(np.int64)


def _ended(is_image_BT: np.ndarray, is_eos_BT: np.ndarray) -> np.ndarray:
    """Where an end of text lies strictly before the token and after the last image."""
    positions_T = np.arange(is_image_BT.shape[1])
    last_image_BT = np.maximum.accumulate(np.where(is_image_BT, positions_T, -1), axis=1)
    last_eos_BT = np.maximum.accumulate(np.where(is_eos_BT, positions_T, -1), axis=1)
    ended_BT = np.zeros(is_image_BT.shape, dtype=bool)
    ended_BT[:, 1:] = last_eos_BT[:, :-1] > last_image_BT[:, 1:]
    return ended_BT
