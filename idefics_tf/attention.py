"""Attention of the text decoder: one core, and self- and cross-attention as two classes.

Unusual:
- Keys and values of earlier positions come in as a value and go out as one (`idefics_tf.cache`).
- Cross-attention never makes keys and values per beam. Queries may come in a multiple of the image rows (beams, several
  samples of one prompt); they are folded into the query axis, so that all of them read the same image keys and values.

Mirrors `idefics_pt/attention.py`. Axes: see `idefics_common`.
"""

import numpy as np
import tensorflow as tf
from keras import ops

from idefics_tf.cache import LayerCache
from idefics_tf.layers import Composite, RMSNorm, dropout, linear, project, reshape, sizes
from idefics_tf.rotary import rotate

_SWAP_HEADS = np.array((0, 2, 1, 3), np.int32)  # an array, because eager execution takes tuples by a detour


def additive_mask(mask):
    """A boolean mask (True = may attend) as a term for float32 scores: 0 where true, the lowest number elsewhere."""
    return tf.where(mask, np.float32(0.0), np.finfo(np.float32).min)


def attend(query, key, value, mask=None, dropout_rate=0.0, seed=None):
    """Attention written out.

    Args:
        query: (B, H, T, K); key, value: (B, H, S, K).
        mask: None, or boolean (True = may attend), broadcastable to (B, H, T, S).
        dropout_rate, seed: see `idefics_tf.layers.dropout`.

    Returns:
        (B, T, H * K) and the weights (B, H, T, S).
    """
    # Scores are held in float32: in float16 the mask's lowest number added to a negative score is -inf for a whole row,
    # and the softmax of such a row has NaN gradients even where its output is thrown away.
    scores = tf.cast(tf.matmul(query * query.shape[-1] ** -0.5, key, transpose_b=True), "float32")
    if mask is not None:
        scores = scores + additive_mask(mask)
    weights = tf.cast(tf.nn.softmax(scores), query.dtype)  # Keras's own warns where there is a single key
    weights = dropout(weights, dropout_rate, seed)
    return merge_heads(tf.matmul(weights, value)), weights


def split_heads(x_BTD, head_width: int):
    """(B, T, H * K) to (B, H, T, K)."""
    rows, length, width = sizes(x_BTD)
    return tf.transpose(reshape(x_BTD, (rows, length, width // head_width, head_width)), _SWAP_HEADS)


def merge_heads(x_BHTK):
    """(B, H, T, K) to (B, T, H * K)."""
    rows, heads, length, head_width = sizes(x_BHTK)
    return reshape(tf.transpose(x_BHTK, _SWAP_HEADS), (rows, length, heads * head_width))


class SelfAttention(Composite):
    """Causal self-attention with rotary positions; LLaMA's."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.dropout = config.dropout
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = linear(width, width, config.initializer_range, "q_proj")
        self.k_proj = linear(width, width, config.initializer_range, "k_proj")
        self.v_proj = linear(width, width, config.initializer_range, "v_proj")
        self.o_proj = linear(width, width, config.initializer_range, "o_proj")

    def call(self, hidden_BTD, rotation, attendable_BHTS=None, past_key_value=None, seed=None):
        """Attend to this and all earlier positions.

        Args:
            hidden_BTD: normed hidden states.
            rotation: what `RotaryEmbedding` makes of the positions.
            attendable_BHTS: boolean, True = may attend; broadcastable.
            past_key_value: this layer's part of a cache, or None.

        Returns:
            (B, T, D); the weights (B, H, T, S); and this layer's part of the cache, extended.
        """
        query, key, value = (
            split_heads(project(layer, hidden_BTD), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        key_value = LayerCache(key, value) if past_key_value is None else past_key_value.extended(key, value)
        out_BTD, weights = attend(query, key_value.key, key_value.value, attendable_BHTS, self.dropout, seed)
        return project(self.o_proj, out_BTD), weights, key_value


class CrossAttention(Composite):
    """Attention from text to images, without positions, with optional RMS norms on queries and keys."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.dropout = config.dropout
        width, image_width = config.hidden_size, config.vision_config.embed_dim
        self.head_dim = width // config.num_attention_heads
        self.q_proj = linear(width, width, config.initializer_range, "q_proj")
        self.k_proj = linear(image_width, width, config.initializer_range, "k_proj")
        self.v_proj = linear(image_width, width, config.initializer_range, "v_proj")
        self.o_proj = linear(width, width, config.initializer_range, "o_proj")
        self.qk_layer_norms = config.qk_layer_norms
        if self.qk_layer_norms:
            self.q_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps, name="q_layer_norm")
            self.k_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps, name="k_layer_norm")

    def project_images(self, image_BME):
        """Keys and values of images, a pair of (B, H, M, K). They depend on nothing else, so they are made once."""
        key = split_heads(self.k_proj(image_BME), self.head_dim)
        if self.qk_layer_norms:
            key = self.k_layer_norm(key)
        return key, split_heads(self.v_proj(image_BME), self.head_dim)

    def call(self, hidden_BTD, image_key_value, image_mask_BTM, seed=None):
        """Attend to the images that each position may see.

        Args:
            hidden_BTD: normed hidden states; their rows are a multiple n of the image rows, n adjacent rows a prompt.
            image_key_value: result of `project_images`.
            image_mask_BTM: boolean, True = may attend; every row has at least one True.

        Returns:
            (B, T, D), and the weights (B, H, T, M).
        """
        rows, length, width = sizes(hidden_BTD)
        key, value = image_key_value
        image_rows, heads, memory, _ = sizes(key)
        query = split_heads(project(self.q_proj, hidden_BTD), self.head_dim)
        if self.qk_layer_norms:
            query = self.q_layer_norm(query)
        mask = image_mask_BTM
        # where sizes are unknown the rows may be the same: folding by 1 then changes nothing
        same_rows = hidden_BTD.shape[0] is not None and hidden_BTD.shape[0] == key.shape[0]
        if not same_rows:
            query = ops.reshape(query, (image_rows, -1, heads, length, self.head_dim))
            query = ops.reshape(ops.transpose(query, (0, 2, 1, 3, 4)), (image_rows, heads, -1, self.head_dim))
            mask = ops.reshape(mask, (image_rows, -1, memory))
        out_BTD, weights = attend(query, key, value, ops.expand_dims(mask, 1), self.dropout, seed)
        if not same_rows:
            out_BTD = ops.reshape(out_BTD, (rows, length, width))
            weights = ops.reshape(weights, (image_rows, heads, -1, length, memory))
            weights = ops.reshape(ops.transpose(weights, (0, 2, 1, 3, 4)), (rows, heads, length, memory))
        return project(self.o_proj, out_BTD), weights
