"""The LLaMA decoder layer (Touvron et al., 2023): pre-norm self-attention and gated MLP, no biases.

Mirrors `idefics_pt/decoder.py`. Axes: see `idefics_common`.
"""

from idefics_tf.attention import SelfAttention
from idefics_tf.gradient_checkpointing import CheckpointedLayer
from idefics_tf.layers import GatedMLP, RMSNorm, dropout


class DecoderLayer(CheckpointedLayer):
    """One layer of the language model; arguments as `SelfAttention.call`."""

    def __init__(self, config, **kwargs):
        super().__init__(config.dropout, **kwargs)
        self.self_attn = SelfAttention(config, name="self_attn")
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.initializer_range, name="mlp"
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, name="input_layernorm")
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, name="post_attention_layernorm"
        )

    def call(self, hidden_BTD, rotation, attendable_BHTS=None, past_key_value=None, training=False, return_all=True):
        """Returns hidden states (B, T, D), the attention weights, and this layer's part of the cache.

        The latter two are None without `return_all`.
        """
        return self.run(hidden_BTD, rotation, attendable_BHTS, past_key_value, return_all, training=training)

    def _forward(self, hidden_BTD, rotation, attendable_BHTS, past_key_value, return_all, seeds):
        attended_BTD, weights, key_value = self.self_attn(
            self.input_layernorm(hidden_BTD), rotation, attendable_BHTS, past_key_value, seed=seeds[0]
        )
        hidden_BTD = hidden_BTD + dropout(attended_BTD, self.dropout, seeds[1])
        dense_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD))
        hidden_BTD = hidden_BTD + dropout(dense_BTD, self.dropout, seeds[2])
        return (hidden_BTD, weights, key_value) if return_all else (hidden_BTD, None, None)
