"""Checks of what a caller gives besides images, so that a mistake is named and not met deep inside as a shape.

Axes: see `idefics_common`.
"""

import sys
import warnings

import torch

from idefics_common.calls.text import check_label_range, check_label_shape

_INSIDE = ("idefics_pt", "torch", "transformers")
# to the loss, and to attention functions
PASSED_ON = {"num_items_in_batch", "shift_labels", "ignore_index"}
PASSED_ON |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def check_labels(labels, logits_BTV):
    """Refuse labels that are not one for each position, or beyond the vocabulary. Raises `ValueError`."""
    check_label_shape(labels.shape, logits_BTV.shape, "; logits_to_keep does not go with labels")
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.is_meta:
        return
    counted = labels[labels != -100]
    if len(counted):
        check_label_range(*(int(extreme) for extreme in torch.aminmax(counted)), logits_BTV.shape[-1])


def warn_of_unknown(kwargs):
    """Say so if arguments will have no effect: a mistyped one would leave the model blind without a word."""
    unknown = sorted(kwargs.keys() - PASSED_ON)
    if unknown and not torch.compiler.is_compiling():
        warnings.warn(f"These arguments have no effect: {', '.join(unknown)}.", stacklevel=stack_level())


def stack_level() -> int:
    """How far up the caller of the model is, for warnings: the first frame of neither torch, transformers nor us."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
