"""Attention of the text decoder: one core, and self- and cross-attention as two classes.

Unusual:
- The implementation (`eager`, `sdpa`, or another that transformers knows) is read from the configuration at each call,
  so `set_attn_implementation` reaches every attention of the model: text, cross, vision and resampler.
- Cross-attention never makes keys and values per beam. Queries may come in a multiple of the image rows (beams, several
  samples of one prompt); they are folded into the query axis, so that all of them read the same image keys and values.

Mirrors `idefics_tf/attention.py`. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from idefics_pt.cpu.onednn import project
from idefics_pt.fused import Fusable
from idefics_pt.layers import RMSNorm
from idefics_pt.rotary import rotate
from idefics_pt.transformers_versions import given_cache

_WITH_ARBITRARY_MASK = ("eager", "sdpa")


def additive_mask(mask, dtype):
    """A boolean mask (True = may attend) as a term for scores: 0 where true, the lowest number of `dtype` elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, for inspection and as the oracle of the fused kernels.

    Args:
        query: (B, H, T, K); key, value: (B, H, S, K).
        attention_mask: None, boolean (True = may attend), or additive; broadcastable to (B, H, T, S).
        scaling: factor on the scores. dropout: rate on the weights while `module` trains.

    Returns:
        (B, T, H, K) and the weights (B, H, T, S), as transformers' attention functions do.
    """
    # Scores are held in float32: in float16 the mask's lowest number added to a negative score is -inf for a whole row,
    # and the softmax of such a row has NaN gradients even where its output is thrown away.
    scores = torch.matmul(query * scaling, key.transpose(-1, -2)).float()
    if attention_mask is not None:
        is_boolean = attention_mask.dtype == torch.bool
        scores = scores + (additive_mask(attention_mask, scores.dtype) if is_boolean else attention_mask)
    weights = scores.softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(module, query, key, value, mask, dropout=0.0, scaling=None, needs_mask=False, **kwargs):
    """Run the attention implementation that `module.config` names; arguments as `eager_attention`.

    Args:
        needs_mask: the mask is no causal or padding mask, so kernels without arbitrary masks are replaced by `sdpa`.

    Returns:
        (B, T, H * K), and the weights (B, H, T, S) or None where the implementation does not compute them.
    """
    implementation = module.config._attn_implementation or "eager"
    if needs_mask and implementation not in _WITH_ARBITRARY_MASK:
        implementation = "sdpa"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rate = dropout if module.training else 0.0
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    if function is sdpa_attention_forward and query.shape[2] == 1 and query.is_cpu and not kwargs:
        # a decoding step: what transformers' function asks first takes up to half as long as the attention itself
        out_BHTK = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=rate, scale=scaling)
        return out_BHTK.transpose(1, 2).flatten(2), None
    out_BTHK, weights = function(module, query, key, value, mask, dropout=rate, scaling=scaling, **kwargs)
    return out_BTHK.flatten(2), weights


def split_heads(x_BTHK, head_width: int, norm=None):
    """(B, T, H * K) to (B, H, T, K). The number of heads is read off, so a tensor-parallel shard works as it is.

    Args:
        norm: of each head's K features, or None. It runs before heads and positions change places, while the features
            lie side by side; after that it would copy them first.
    """
    if x_BTHK.shape[-1] % head_width:
        raise ValueError(
            f"{x_BTHK.shape[-1]} features are no whole number of heads of width {head_width}; with tensor parallelism, "
            "the heads of the decoder, the vision tower and the resampler must be multiples of the number of processes."
        )
    x_BTHK = x_BTHK.unflatten(-1, (-1, head_width))
    return (x_BTHK if norm is None else norm(x_BTHK)).transpose(1, 2)


class SelfAttention(Fusable):
    """Causal self-attention with rotary positions; LLaMA's."""

    is_causal = True
    same_input = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_BTD, rotation, mask=None, past_key_values=None, cache=None, **kwargs):
        """Attend to this and all earlier positions.

        Args:
            hidden_BTD: normed hidden states.
            rotation: what `RotaryEmbedding` makes of the positions.
            mask: what `transformers.masking_utils.create_causal_mask` made for the implementation in use.
            past_key_values, or cache: a `Cache` to read and extend, or None.

        Returns:
            (B, T, D), and the weights (B, H, T, S) or None where the implementation does not compute them.
        """
        query, key, value = (split_heads(x_BTHK, self.head_dim) for x_BTHK in self.project_same_input(hidden_BTD))
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out_BTD, weights = attend(self, query, key, value, mask, self.config.dropout, **kwargs)
        return project(self.o_proj, out_BTD), weights


class CrossAttention(nn.Module):
    """Attention from text to images, without positions, with optional RMS norms on queries and keys."""

    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, image_width = config.hidden_size, config.vision_config.embed_dim
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(image_width, width, bias=False)
        self.v_proj = nn.Linear(image_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_layer_norm = self.k_layer_norm = None
        if config.qk_layer_norms:
            self.q_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_layer_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project_images(self, image_BME):
        """Keys and values of images, a pair of (B, H, M, K). They depend on nothing else, so they are made once."""
        key = split_heads(project(self.k_proj, image_BME), self.head_dim, self.k_layer_norm)
        return key, split_heads(project(self.v_proj, image_BME), self.head_dim)

    def forward(self, hidden_BTD, image_key_value, image_mask_BTM):
        """Attend to the images that each position may see.

        Args:
            hidden_BTD: normed hidden states; their rows are a multiple n of the image rows, n adjacent rows a prompt.
            image_key_value: result of `project_images`.
            image_mask_BTM: boolean, True = may attend; every row has at least one True.

        Returns:
            (B, T, D), and the weights (B, H, T, M) or None where the implementation does not compute them.
        """
        rows, length = hidden_BTD.shape[:2]
        key, value = image_key_value
        rows_per_prompt = rows // key.shape[0]
        query = split_heads(project(self.q_proj, hidden_BTD), self.head_dim, self.q_layer_norm)
        mask = image_mask_BTM
        if rows_per_prompt > 1:
            query = query.unflatten(0, (-1, rows_per_prompt)).transpose(1, 2).flatten(2, 3)
            mask = mask.unflatten(0, (-1, rows_per_prompt)).flatten(1, 2)
        out_BTD, weights = attend(self, query, key, value, mask.unsqueeze(1), self.config.dropout, needs_mask=True)
        if rows_per_prompt > 1:
            out_BTD = out_BTD.reshape(rows, length, -1)
            if weights is not None:
                weights = weights.unflatten(2, (rows_per_prompt, length)).transpose(1, 2).flatten(0, 1)
        return project(self.o_proj, out_BTD), weights
