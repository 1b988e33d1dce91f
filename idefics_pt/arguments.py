"""Checks of what a caller gives besides images, so that a mistake is named and not met deep inside as a shape.

Axes: see `idefics_common`.
"""

import sys
import warnings

import torch

_INSIDE = ("idefics_pt", "torch", "transformers")
_PASSED_ON = frozenset(
    # to the loss, and to attention functions
    (
        "num_items_in_batch",
        "shift_labels",
        "ignore_index",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    )
)


def check_text(input_ids, inputs_embeds, attention_mask, cache):
    """Refuse text whose shapes do not fit together. Raises `ValueError`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    name, text, axes = ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    if text.dim() != axes or 0 in text.shape:
        wanted = "(batch, text_len)" if axes == 2 else "(batch, text_len, hidden_size)"
        raise ValueError(f"{name} must have shape {wanted} and hold something, got {tuple(text.shape)}.")
    if not isinstance(attention_mask, torch.Tensor):
        return  # flex attention has a class of its own for masks
    if attention_mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask must have 2 or 4 axes, got shape {tuple(attention_mask.shape)}.")
    if attention_mask.dim() == 4 or cache is not None:
        return
    if attention_mask.shape != text.shape[:2]:
        raise ValueError(f"attention_mask must have shape {tuple(text.shape[:2])}, got {tuple(attention_mask.shape)}.")


def check_labels(labels, logits_BTV):
    """Refuse labels that are not one for each position, or beyond the vocabulary. Raises `ValueError`."""
    if labels.shape != logits_BTV.shape[:2]:
        raise ValueError(
            f"labels must have shape {tuple(logits_BTV.shape[:2])}, one for each position with logits, got "
            f"{tuple(labels.shape)}; logits_to_keep does not go with labels."
        )
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.is_meta:
        return
    counted = labels[labels != -100]
    if len(counted) == 0:
        return
    lowest, highest = (int(extreme) for extreme in torch.aminmax(counted))
    if lowest < 0 or highest >= logits_BTV.shape[-1]:
        raise ValueError(f"labels must be -100 or lie in [0, {logits_BTV.shape[-1]}), got {lowest} to {highest}.")


def warn_of_unknown(kwargs):
    """Say so if arguments will have no effect: a mistyped one would leave the model blind without a word."""
    unknown = sorted(kwargs.keys() - _PASSED_ON)
    if unknown and not torch.compiler.is_compiling():
        warnings.warn(f"These arguments have no effect: {', '.join(unknown)}.", stacklevel=stack_level())


def stack_level() -> int:
    """How far up the caller of the model is, for warnings: the first frame of neither torch, transformers nor us."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
