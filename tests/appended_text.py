"""Prompts with images and what was appended to them, with the mask of the prompts alone, as training tools do it."""

import numpy as np

from idefics_common.prompts.image_masks import image_attention_mask

IMAGE, EOS, PAD = 99, 2, 0
"""Ids of the small models of `tests.models`: the last of the additional vocabulary, and two of the base one."""

PROMPTS = [[5, IMAGE, 6, 7, IMAGE, 8], [9, 10, IMAGE], [3, 4, 5, 6]]
COMPLETIONS = [[11, 12], [13, 14, 15, 16], [17]]
LAYOUTS = ("left", "right", "flushed")


def appended_text(config, layout: str) -> tuple[dict, np.ndarray]:
    """Text of three rows, prompts and completions side by side.

    Args:
        layout: the side on which prompts are padded; or "flushed": on the left, but then all padding goes to the end.

    Returns:
        the inputs, with an image mask over the prompts as they were before; and the mask over the whole text.
    """
    prompts = _padded(PROMPTS, "right" if layout == "right" else "left")
    ids = np.concatenate((prompts, _padded(COMPLETIONS, "right")), axis=1)
    if layout == "flushed":
        ids = _padded([row[row != PAD].tolist() for row in ids], "right")
    vision = config.vision_config
    shape = (len(ids), 2, vision.num_channels, vision.image_size, vision.image_size)
    mask = image_attention_mask(prompts, IMAGE, EOS, 2)
    if layout == "right":
        mask *= (prompts != PAD)[..., None]  # so that the last row of a padded prompt sees nothing
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).astype(np.int64),
        "pixel_values": np.random.default_rng(0).standard_normal(shape).astype(np.float32),
        "image_attention_mask": mask,
    }
    return inputs, image_attention_mask(ids, IMAGE, EOS, 2)


def _padded(rows, side: str):
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    return np.array([row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)])
