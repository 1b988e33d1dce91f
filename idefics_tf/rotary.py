"""Rotary position embeddings (Su et al., "RoFormer", 2021), computed once per forward and shared by all layers.

Unusual: the frequencies are constants that no checkpoint holds, made from `config.rope_parameters`. Of the scaled
variants, those are here whose frequencies do not depend on the length of the text: linear and LLaMA 3.

Mirrors `idefics_pt/rotary.py`. Axes: see `idefics_common`.
"""

import math

import keras
import numpy as np
import tensorflow as tf
from keras import ops


def default_frequencies(config) -> np.ndarray:
    """Frequencies of unscaled rotary embeddings, (K / 2,) float32 in radians per position."""
    width = config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / config.rope_parameters["rope_theta"] ** exponents.astype(np.float64)).astype(np.float32)


def linear_frequencies(config) -> np.ndarray:
    """Positions pressed together by `factor` (Chen et al., "Extending context window", 2023)."""
    return default_frequencies(config) / np.float32(config.rope_parameters["factor"])


def llama3_frequencies(config) -> np.ndarray:
    """Long waves divided by `factor`, short ones kept, and a ramp between (Grattafiori et al., "Llama 3", 2024)."""
    parameters = config.rope_parameters
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = default_frequencies(config)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / parameters["factor"])).astype(np.float32)


FREQUENCIES = {"default": default_frequencies, "linear": linear_frequencies, "llama3": llama3_frequencies}


class RotaryEmbedding(keras.layers.Layer):
    """The table of angles: position ids (B, T) to factors of `rotate`."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in FREQUENCIES:
            raise ValueError(f"rope_type must be one of {', '.join(FREQUENCIES)} in Keras; got {rope_type!r}.")
        self.inv_freq = FREQUENCIES[rope_type](config)
        self.head_width = config.hidden_size // config.num_attention_heads

    def call(self, position_ids):
        """Factors of `rotate` for `position_ids` (B, T), in the layer's compute dtype.

        Returns:
            cosines (B, 1, T, K), and sines (B, 1, T, K) that are negative in the first half of K.
        """
        angles = ops.cast(ops.expand_dims(position_ids, (1, 3)), "float32") * self.inv_freq
        cos, sin = ops.cos(angles), ops.sin(angles)
        if self.head_width == 1:
            # a head of one feature has no pair; transformers lets it be both halves of one, and negative in the second
            factors = 2**0.5 * cos, -(2**0.5) * sin
        else:
            factors = ops.concatenate((cos, cos), axis=-1), ops.concatenate((-sin, sin), axis=-1)
        return tuple(ops.cast(factor, self.compute_dtype) for factor in factors)


def rotate(x_BHTK, cos_B1TK, sin_B1TK):
    """Turn each pair of features (k, k + K/2) by its angle, given the result of `RotaryEmbedding`."""
    if x_BHTK.shape[-1] == 1:
        return x_BHTK * (cos_B1TK + sin_B1TK)
    first, second = tf.split(x_BHTK, 2, axis=-1)
    return x_BHTK * cos_B1TK + tf.concat((second, first), axis=-1) * sin_B1TK
