"""How variables start: as transformers' IDEFICS does, or not at all where a file is about to give their values.

Unusual: Keras computes initial values when a variable is made. For a model that is being loaded that would draw
billions of random numbers to throw them away, so within `values_follow` the initializers of this library reserve memory
and leave it as it is; untouched memory costs nothing.

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
    """Within, `Normal` computes nothing: whoever makes variables here promises to assign every one of them.

    TensorFlow, not Keras, gives the variables short names.
    """
    token = _values_follow.set(True)
    try:
        with tf.variable_creator_scope(_with_short_name):
            yield
    finally:
        _values_follow.reset(token)


def _with_short_name(next_creator, **kwargs):
    """Make a variable that TensorFlow calls "kernel", say, instead of by its path; Keras calls it as ever.

    TensorFlow looks for the kernel of an operation anew for every name and shape of a variable, which takes longer than
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
        return ops.where(ops.arange(shape[0])[:, None] == self.zero_row, ops.zeros_like(values), values)


def alpha_initializer(config) -> keras.initializers.Initializer:
    """How the gates of a configuration start."""
    if config.alpha_initializer in ("zeros", "ones"):
        return keras.initializers.get(config.alpha_initializer)
    return Normal(config.alphas_initializer_range)
