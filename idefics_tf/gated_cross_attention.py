"""The gated cross-attention block that stands before every k-th decoder layer (Alayrac et al., "Flamingo", 2022).

The block has two kinds of gate. ``tanh(alpha)``, learned, scales both of its residual branches and starts at zero, so
that a fresh block leaves the language model as it was. A boolean gate per position removes the attention branch where a
token may see no image; the MLP branch stays, as in the training of the checkpoints.

Mirrors `idefics_pt/gated_cross_attention.py`. Axes: see `idefics_common`.
"""

from keras import ops

from idefics_tf.attention import CrossAttention
from idefics_tf.gradient_checkpointing import CheckpointedLayer
from idefics_tf.initialization import alpha_initializer
from idefics_tf.layers import GatedMLP, RMSNorm, dropout


class GatedCrossAttentionLayer(CheckpointedLayer):
    """Cross-attention to images and an MLP, each added through a learned gate."""

    def __init__(self, config, **kwargs):
        super().__init__(config.dropout, **kwargs)
        width = config.hidden_size
        alpha_shape = (1,) if config.alpha_type == "float" else (1, 1, width)
        self.alpha_options = {"shape": alpha_shape, "initializer": alpha_initializer(config)}
        self.cross_attn = CrossAttention(config, name="cross_attn")
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, config.initializer_range, name="mlp")
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps, name="input_layernorm")
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps, name="post_attention_layernorm")

    def build(self, input_shape=None):
        self.alpha_cross_attn = self.add_weight(name="alpha_cross_attn", **self.alpha_options)
        self.alpha_dense = self.add_weight(name="alpha_dense", **self.alpha_options)
        super().build()

    def call(self, hidden_BTD, image_BME, image_key_value, image_mask_BTM, gate_BT, training=False, return_all=True):
        """Let text attend to images.

        Args:
            hidden_BTD: hidden states.
            image_BME: image states whose keys and values are not known yet, or None.
            image_key_value: keys and values (B, H, M, K) of images seen earlier, or None; those of `image_BME` come
                after them. If both are None, there is no image at all.
            image_mask_BTM: boolean, True = may attend, over all M; every row has at least one True, see `gate_BT`.
            gate_BT: boolean, False where a position may see no image.
            return_all: return more than hidden states; all else is None otherwise.

        Returns:
            hidden states (B, T, D); keys and values of all images, or None; the weights (B, H, T, M); and the gates
            (B, T, 1) or (B, T, D), the factor on the attention branch. The last two are None without images.
        """
        return self.run(hidden_BTD, image_BME, image_key_value, image_mask_BTM, gate_BT, return_all, training=training)

    def _forward(self, hidden_BTD, image_BME, image_key_value, image_mask_BTM, gate_BT, return_all, seeds):
        weights = gates = None
        if image_BME is not None:
            new = self.cross_attn.project_images(image_BME)
            if image_key_value is not None:
                new = tuple(ops.concatenate(pair, axis=2) for pair in zip(image_key_value, new, strict=True))
            image_key_value = new
        if image_key_value is not None:
            attended_BTD, weights = self.cross_attn(
                self.input_layernorm(hidden_BTD), image_key_value, image_mask_BTM, seed=seeds[0]
            )
            attended_BTD = dropout(attended_BTD, self.dropout, seeds[1])
            attended_BTD = ops.where(ops.expand_dims(gate_BT, -1), attended_BTD, 0.0)
            alpha = ops.tanh(ops.cast(self.alpha_cross_attn, self.compute_dtype))
            hidden_BTD = hidden_BTD + alpha * attended_BTD
            gates = alpha * ops.cast(ops.expand_dims(gate_BT, -1), attended_BTD.dtype)
        dense_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD))
        dense_BTD = dropout(dense_BTD, self.dropout, seeds[2])
        hidden_BTD = hidden_BTD + ops.tanh(ops.cast(self.alpha_dense, self.compute_dtype)) * dense_BTD
        return (hidden_BTD, image_key_value, weights, gates) if return_all else (hidden_BTD, None, None, None)
