"""The vision tower: a CLIP ViT (Radford et al., 2021) on one image at a time.

Unusual: text attends to the output of the last layer as it is; the final norm only makes `pooler_output`. The
misspelt `pre_layrnorm` is its name in the published checkpoints. Position embeddings for other image sizes are
interpolated by matrices that both rooms share (`idefics_common.position_grid`).

Mirrors `idefics_tf/vision.py`. Axes: see `idefics_common`; here B runs over images.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from idefics_common.calls.images import check_pixels
from idefics_common.position_grid import interpolation_matrix
from idefics_pt.attention import attend, split_heads
from idefics_pt.cpu.onednn import project, project_and_activate


class VisionEmbeddings(nn.Module):
    """Patches and a class token, with learned positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, patch = config.embed_dim, config.patch_size
        self.grid_size = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(self.grid_size**2 + 1, width)

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        """Embed pixels (B, C, height, width) as (B, P, E)."""
        check_pixels(pixel_values.shape, self.config, interpolate_pos_encoding)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid_shape = patches.shape[-2:]
        class_B1E = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens_BPE = torch.cat((class_B1E, patches.flatten(2).transpose(1, 2)), dim=1)
        return tokens_BPE + self._positions(grid_shape, tokens_BPE.device)

    def _positions(self, grid_shape, device):
        # looked up, not read: offloaded parameters are at hand only while their module runs
        indices = torch.arange(self.grid_size**2 + 1, device=device)
        positions_PE = self.position_embedding(indices)
        if tuple(grid_shape) == (self.grid_size, self.grid_size):
            return positions_PE
        rows, columns = (
            torch.from_numpy(interpolation_matrix(self.grid_size, size)).to(positions_PE.device) for size in grid_shape
        )
        # in float32, whatever the model's precision: these are weights of the model, not activations
        grid = positions_PE[1:].float().unflatten(0, (self.grid_size, self.grid_size))
        grid = torch.einsum("yi,xj,ije->yxe", rows, columns, grid)
        return torch.cat((positions_PE[:1], grid.flatten(0, 1).to(positions_PE.dtype)))


class VisionAttention(nn.Module):
    """Self-attention over the tokens of one image, with biases."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention_dropout = config.vision_config.attention_dropout
        width = config.vision_config.embed_dim
        self.head_dim = width // config.vision_config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_BPE):
        """Returns (B, P, E), and the weights (B, H, P, P) or None where the implementation does not compute them."""
        query, key, value = (
            split_heads(project(layer, hidden_BPE), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BPE, weights = attend(self, query, key, value, None, self.attention_dropout, is_causal=False)
        return project(self.out_proj, out_BPE), weights


class VisionMLP(nn.Module):
    """Two linear layers with an activation between them, with biases."""

    def __init__(self, config):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, hidden_BPE):
        return project(self.fc2, project_and_activate(self.fc1, self.activation_fn, hidden_BPE))


class VisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        width, eps = config.vision_config.embed_dim, config.vision_config.layer_norm_eps
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = VisionMLP(config.vision_config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden_BPE):
        """Returns (B, P, E) and the attention weights or None."""
        attended_BPE, weights = self.self_attn(self.layer_norm1(hidden_BPE))
        hidden_BPE = hidden_BPE + attended_BPE
        return hidden_BPE + self.mlp(self.layer_norm2(hidden_BPE)), weights


class VisionEncoder(nn.Module):
    """The layers, in a module of their own because the published names have it."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(VisionEncoderLayer(config) for _ in range(config.vision_config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Pixels (B, C, height, width) to vision tokens (B, P, E).

    Args:
        config: the whole `IdeficsConfig`; sizes come from its `vision_config`, the attention implementation from it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config.vision_config
        width, eps = self.config.embed_dim, self.config.layer_norm_eps
        self.embeddings = VisionEmbeddings(self.config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, pixel_values, interpolate_pos_encoding=False, output_attentions=False, output_hidden_states=False
    ):
        """Encode images.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (B, P, E), what text attends to; `pooler_output` (B, E);
            on request `hidden_states`, embeddings and each layer's output, and `attentions` (B, H, P, P) per layer.

        Raises:
            ValueError: if the pixels do not have the model's channels or size.
        """
        hidden_BPE = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        hidden_states, attentions = [hidden_BPE], []
        for layer in self.encoder.layers:
            hidden_BPE, weights = layer(hidden_BPE)
            if output_hidden_states:
                hidden_states.append(hidden_BPE)
            attentions.append(weights)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_BPE,
            pooler_output=self.post_layernorm(hidden_BPE[:, 0]),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
