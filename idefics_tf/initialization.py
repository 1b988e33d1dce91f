"""Initial values of variables: those of transformers' IDEFICS, or none where a file is about to give the values.

Keras computes initial values when a variable is made, which for a model that is being loaded would be billions of
random numbers for nothing. Within `values_follow` the initializers of this library reserve memory and do not touch it.

Keras alone has this file; in `idefics_pt` transformers does it.
"""

import contextlib
import contextvars

import keras
import tensorflow as tf
from keras import ops

_values_follow = contextvars.ContextVar("values_follow", default=False)


@contextlib.contextmanager
def values_follow():
    """Leave variables made within uninitialised, if their initializer is `Normal`; the caller must assign them all.

    TensorFlow's (not Keras's) names of these variables are short, see `_with_short_name`.
    """
    token = _values_follow.set(True)
    try:
        with tf.variable_creator_scope(_with_short_name):
            yield
    finally:
        _values_follow.reset(token)


def _with_short_name(next_creator, **kwargs):
    """Make a variable that TensorFlow names "kernel", say, and not by its path; its name in Keras stays.

    TensorFlow looks up an operation's kernel for every new name and shape of a variable, which takes longer than all
    the rest of making it.
    """
    if kwargs.get("name"):
        kwargs["name"] += "/"  # so ends a name that no name scope adds to
    return next_creator(**kwargs)


class Normal(keras.initializers.RandomNormal):
    """Normal numbers around 0.

    Args:
        stddev: their standard deviation.
        zero_row: a row that is zero, or None.
    """

    def __init__(self, stddev: float, zero_row: int | None = None):
        super().__init__(mean=0.0, stddev=stddev)
        self.zero_row = zero_row

    def __call__(self, shape, dtype=None):
        if _values_follow.get():
            return tf.raw_ops.Empty(shape=tuple(shape), dtype=dtype, init=False)
        values = super().__call__(shape, dtype)
        if self.zero_row is None:
            return values
        row = self.zero_row % shape[0]  # negative ones count from the end
        return ops.where(ops.arange(shape[0])[:, None] == row, ops.zeros_like(values), values)


def alpha_initializer(config) -> keras.initializers.Initializer:
    """How the gates of a configuration start."""
    if config.alpha_initializer in ("zeros", "ones"):
        return keras.initializers.get(config.alpha_initializer)
    return Normal(config.alphas_initializer_range)
