"""Checks of labels by their values, which are looked at in eager execution only.

Mirrors `idefics_pt/arguments.py`, which also warns of unknown arguments; Keras refuses them. What shapes say is checked
in `idefics_common.calls`. Axes: see `idefics_common`.
"""

import tensorflow as tf
from keras import ops

from idefics_common.calls.text import check_label_range, check_label_shape
from idefics_tf.training import IGNORE_INDEX


def check_labels(labels, logits_BTV):
    """Refuse labels that are not one for each position, or beyond the vocabulary. Raises `ValueError`."""
    check_label_shape(labels.shape, logits_BTV.shape)
    if not tf.executing_eagerly():
        return
    counted = tf.boolean_mask(labels, ops.not_equal(labels, IGNORE_INDEX))
    if len(counted):
        check_label_range(int(ops.min(counted)), int(ops.max(counted)), logits_BTV.shape[-1])
