"""The gated cross-attention block that stands before every k-th decoder layer (Alayrac et al., "Flamingo", 2022).

Unusual: the block is closed in two ways. ``tanh(alpha)``, learned, scales both of its residual branches and starts at
zero, so a fresh block leaves the language model as it was. And a boolean gate per position removes the attention branch
where a token may see no image; the MLP branch stays, as the checkpoints were trained.

Mirrors `idefics_tf/gated_cross_attention.py`. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from idefics_pt.attention import CrossAttention
from idefics_pt.layers import GatedMLP, RMSNorm, dropout


class GatedCrossAttentionLayer(GradientCheckpointingLayer):
    """Cross-attention to images and an MLP, each added through a learned gate."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        alpha_shape = (1,) if config.alpha_type == "float" else (1, 1, width)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(alpha_shape))
        self.alpha_dense = nn.Parameter(torch.zeros(alpha_shape))
        self.cross_attn = CrossAttention(config)
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, hidden_BTD, image_BME, image_key_value, image_mask_BTM, gate_BT):
        """Let text attend to images.

        Args:
            hidden_BTD: hidden states.
            image_BME: image states whose keys and values are not known yet, or None.
            image_key_value: keys and values (B, H, M, K) of images seen earlier, or None; those of `image_BME` come
                after them. If both are None, there is no image at all.
            image_mask_BTM: boolean, True = may attend, over all M; every row has at least one True, see `gate_BT`.
            gate_BT: boolean, False where a position may see no image.

        Returns:
            hidden states (B, T, D); keys and values of all images, or None; and, where the implementation computes
            weights, those (B, H, T, M), and the gates (B, T, 1) or (B, T, D), the factor on the attention branch: else
            None twice.
        """
        weights = gates = None
        if image_BME is not None:
            new = self.cross_attn.project_images(image_BME)
            if image_key_value is not None:
                new = tuple(torch.cat(pair, dim=2) for pair in zip(image_key_value, new, strict=True))
            image_key_value = new
        if image_key_value is not None:
            attended_BTD, weights = self.cross_attn(self.input_layernorm(hidden_BTD), image_key_value, image_mask_BTM)
            attended_BTD = dropout(attended_BTD, self.dropout, self)
            attended_BTD = attended_BTD.masked_fill(~gate_BT.unsqueeze(-1), 0.0)
            hidden_BTD = hidden_BTD + self.alpha_cross_attn.tanh() * attended_BTD
            if weights is not None:
                # made here because an offloaded or sharded parameter is at hand only while its layer runs
                gates = self.alpha_cross_attn.tanh() * gate_BT.unsqueeze(-1)
        dense_BTD = self.mlp(self.post_attention_layernorm(hidden_BTD))
        dense_BTD = dropout(dense_BTD, self.dropout, self)
        return hidden_BTD + self.alpha_dense.tanh() * dense_BTD, image_key_value, weights, gates
