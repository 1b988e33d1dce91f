"""The Perceiver resampler (Jaegle et al., 2021; Alayrac et al., "Flamingo", 2022): any number of vision tokens of one
image to a few latents.

Unusual: the latents are keys and values too, appended to the vision tokens; queries and keys may have layer norms
per head; the MLP is a plain ReLU one with a norm of its own.

Mirrors `idefics_tf/perceiver.py`. Axes: see `idefics_common`; here B runs over images.
"""

import torch
from torch import nn

from idefics_pt.attention import attend, split_heads
from idefics_pt.cpu.onednn import project


class PerceiverAttention(nn.Module):
    """Latents attend to the vision tokens and to themselves."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        perceiver, width = config.perceiver_config, config.vision_config.embed_dim
        self.head_dim = perceiver.resampler_head_dim
        inner_width = perceiver.resampler_n_heads * self.head_dim
        self.context_layer_norm = nn.LayerNorm(width)
        self.latents_layer_norm = nn.LayerNorm(width)
        self.q_layer_norm = self.k_layer_norm = None
        if perceiver.qk_layer_norms_perceiver:
            self.q_layer_norm = nn.LayerNorm(self.head_dim)
            self.k_layer_norm = nn.LayerNorm(self.head_dim)
        self.q_proj = nn.Linear(width, inner_width, bias=False)
        self.k_proj = nn.Linear(width, inner_width, bias=False)
        self.v_proj = nn.Linear(width, inner_width, bias=False)
        self.output_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, context_BPE, latents_BLE):
        """Returns (B, L, E), and the weights (B, H, L, P + L) or None if the implementation makes none."""
        latents_BLE = self.latents_layer_norm(latents_BLE)
        sources = torch.cat((self.context_layer_norm(context_BPE), latents_BLE), dim=1)
        query = split_heads(project(self.q_proj, latents_BLE), self.head_dim, self.q_layer_norm)
        key = split_heads(project(self.k_proj, sources), self.head_dim, self.k_layer_norm)
        value = split_heads(project(self.v_proj, sources), self.head_dim)
        out_BLD, weights = attend(self, query, key, value, None, is_causal=False)
        return project(self.output_proj, out_BLD), weights


class PerceiverMLP(nn.Module):
    """Norm, linear, ReLU, linear; four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents_BLE):
        return project(self.c_proj, project(self.fc, self.ln(latents_BLE)).relu())


class PerceiverResampler(nn.Module):
    """Vision tokens (B, P, E) to latents (B, L, E).

    Each block is a pair (attention, MLP) in a `ModuleList`, because the published names number them 0 and 1.
    """

    def __init__(self, config):
        super().__init__()
        perceiver, width = config.perceiver_config, config.vision_config.embed_dim
        self.latents = nn.Parameter(torch.randn(perceiver.resampler_n_latents, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(config), PerceiverMLP(width))) for _ in range(perceiver.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, context_BPE):
        """Returns latents (B, L, E), and the attention weights of each block or Nones."""
        latents_BLE = self.latents.expand(context_BPE.shape[0], -1, -1)
        attentions = []
        for attention, mlp in self.blocks:
            resampled_BLE, weights = attention(context_BPE, latents_BLE)
            latents_BLE = latents_BLE + resampled_BLE
            latents_BLE = latents_BLE + mlp(latents_BLE)
            attentions.append(weights)
        return self.layer_norm(latents_BLE), tuple(attentions)
