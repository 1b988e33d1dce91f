"""The LLaMA decoder layer (Touvron et al., 2023): pre-norm self-attention and gated MLP, no biases.

Mirrors `idefics_tf/decoder.py`. Axes: see `idefics_common`.
"""

from transformers.modeling_layers import GradientCheckpointingLayer

from idefics_pt.attention import SelfAttention
from idefics_pt.layers import GatedMLP, RMSNorm, dropout


class DecoderLayer(GradientCheckpointingLayer):
    """One layer of the language model; arguments as `SelfAttention.forward`."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = SelfAttention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BTD, rotation, mask=None, **kwargs):
        """Returns hidden states (B, T, D), and the attention weights or None."""
        attended_BTD, weights = self.self_attn(self.input_layernorm(hidden_BTD), rotation, mask, **kwargs)
        hidden_BTD = hidden_BTD + dropout(attended_BTD, self.dropout, self)
        dense_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD + dropout(dense_BTD, self.dropout, self), weights
