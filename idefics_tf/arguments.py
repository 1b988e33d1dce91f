"""Checks of what a caller gives besides images, so that a mistake is named and not met deep inside as a shape.

Unusual: sizes that a graph does not know are trusted, and values are looked at in eager execution only.

Mirrors `idefics_pt/arguments.py`, which also warns of unknown arguments; Keras refuses them. Axes: see
`idefics_common`.
"""

import tensorflow as tf
from keras import ops

from idefics_tf.training import IGNORE_INDEX


def check_text(input_ids, inputs_embeds, attention_mask, cache):
    """Refuse text whose shapes do not fit together. Raises `ValueError`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    name, text, axes = ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    if len(text.shape) != axes or 0 in text.shape:
        wanted = "(batch, text_len)" if axes == 2 else "(batch, text_len, hidden_size)"
        raise ValueError(f"{name} must have shape {wanted} and hold something, got {tuple(text.shape)}.")
    if attention_mask is None:
        return
    if len(attention_mask.shape) != 2:
        raise ValueError(f"attention_mask must have 2 axes, got shape {tuple(attention_mask.shape)}.")
    if cache is not None:
        return
    if not _fits(attention_mask.shape, text.shape[:2]):
        raise ValueError(f"attention_mask must have shape {tuple(text.shape[:2])}, got {tuple(attention_mask.shape)}.")


def check_labels(labels, logits_BTV):
    """Refuse labels that are not one for each position, or beyond the vocabulary. Raises `ValueError`."""
    if not _fits(labels.shape, logits_BTV.shape[:2]):
        raise ValueError(
            f"labels must have shape {tuple(logits_BTV.shape[:2])}, one for each position with logits, got "
            f"{tuple(labels.shape)}."
        )
    if not tf.executing_eagerly():
        return
    counted = tf.boolean_mask(labels, ops.not_equal(labels, IGNORE_INDEX))
    if len(counted) == 0:
        return
    lowest, highest = int(ops.min(counted)), int(ops.max(counted))
    if lowest < 0 or highest >= logits_BTV.shape[-1]:
        raise ValueError(f"labels must be -100 or lie in [0, {logits_BTV.shape[-1]}), got {lowest} to {highest}.")


def _fits(shape, expected) -> bool:
    if len(shape) != len(expected):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(shape, expected, strict=True))
